"""A run's records: what each evaluation gave, and training up to it."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from input_pipeline.files import cannot_be_written, flush, written_aside


class Records:
    """`WORKDIR/metrics.jsonl`, a line per evaluation, and TensorBoard's files beside it."""

    def __init__(self, workdir: Path):
        # Imports TensorFlow: slow, and only training needs it. It computes nothing here; without
        # these it announces its own settings.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        from clu import metric_writers

        self._path = Path(workdir) / "metrics.jsonl"
        self._writer = metric_writers.create_default_writer(os.fspath(workdir))

    def cut_back(self, step: int) -> dict[str, Any] | None:
        """Drops records after `step`, which will be made again; returns that of `step` itself."""
        if not self._path.exists():
            return None
        records = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                records.append((int(record["step"]), record))
            except (ValueError, KeyError, TypeError):
                # Written in part, by a kill or on a full disk; its evaluation is made again.
                logging.warning("%s: dropping a damaged line: %.60s", self._path, line)
        kept = [record for of_step, record in records if of_step <= step]
        if len(kept) < len(records):
            logging.warning(
                "%s: %d evaluations after step %d are made again",
                self._path,
                len(records) - len(kept),
                step,
            )
        with written_aside(self._path) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return kept[-1] if kept and kept[-1]["step"] == step else None

    def write(self, record: dict[str, Any], training: dict[str, float]) -> None:
        """Appends an evaluation, with `training`'s means since the one before.

        Raises:
            OSError: it cannot be written; the message names the file.
        """
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({**record, "training": training}) + "\n")
            flush(self._path)
        except OSError as error:
            raise cannot_be_written(self._path, error) from error
        scalars = {
            f"validation/{key}": record[key]
            for key in (
                *("top1", "top5", "mean_average_precision", "loss"),
                *("ema_top1", "ema_mean_average_precision", "ema_loss"),
            )
            if key in record
        }
        scalars.update({f"train/{key}": value for key, value in training.items()})
        with self._named():
            self._writer.write_scalars(record["step"], scalars)
            self._writer.flush()

    def close(self) -> None:
        """Finishes TensorBoard's files."""
        with self._named():
            self._writer.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Names the files that TensorFlow's errors, of its own kinds, leave unnamed."""
        try:
            yield
        except Exception as error:
            files = self._path.with_name("events.out.tfevents.*")
            raise OSError(f"{files} cannot be written: {error}") from error
