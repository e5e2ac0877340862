"""Training: the loop, its checkpoints and its records.

batch -> train step -> ... -> validation -> metrics.jsonl, TensorBoard -> checkpoint
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
from rvit_jax import checkpoint, evaluate, losses, optimizer, steps
from rvit_jax.augment import make_augment
from rvit_jax.command import Stopped
from rvit_jax.initialise import initialise
from rvit_jax.model import RViT

# Seconds between two looks at the device's sums: each look waits for the device.
LOOK_EVERY_S = 2.0
TRAINING_SUMS = "training_sums"  # beside the data position in a checkpoint


class Interrupted(Stopped):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int):
        super().__init__(signum, "the state is saved, and the same command goes on")


class _StopRequest:
    """Set by the first SIGINT or SIGTERM; the second one ends the process at once."""

    def __init__(self):
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def _handle(self, signum: int, _frame) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        # Not `print`, which may have been interrupted by the signal itself.
        os.write(2, b"\nstopping after this step; once more to leave at once\n")

    @contextlib.contextmanager
    def listen(self) -> Iterator["_StopRequest"]:
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


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
        for line in self._path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                # Written in part, by a kill or on a full disk; its evaluation is made again.
                logging.warning("%s: dropping a damaged line: %.60s", self._path, line)
        records = [record for record in records if record["step"] <= step]
        aside = self._path.with_name(f".{self._path.name}.tmp")
        aside.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(aside, self._path)
        return records[-1] if records and records[-1]["step"] == step else None

    def write(self, record: dict[str, Any], training: dict[str, float]) -> None:
        """Appends an evaluation, with `training`'s means since the one before."""
        with self._path.open("a") as file:
            file.write(json.dumps({**record, "training": training}) + "\n")
        scalars = {
            f"validation/{key}": record[key]
            for key in ("top1", "top5", "mean_average_precision", "loss")
            if key in record
        }
        scalars.update({f"train/{key}": value for key, value in training.items()})
        self._writer.write_scalars(record["step"], scalars)
        self._writer.flush()

    def close(self) -> None:
        """Finishes TensorBoard's files."""
        self._writer.close()


class _TrainingSums:
    """Sums of the steps since the last evaluation; fetched seldom, since that waits.

    Attributes:
        total: as of the last `fetch`; it is saved with the state, so that a resumed run writes the
            same records.
    """

    def __init__(self):
        self._pending: list[dict[str, jax.Array]] = []
        self._looked = time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Starts anew, after an evaluation."""
        self.total = {"clips": 0.0, "loss": 0.0, "right": 0.0, "skipped": 0.0}

    def add(self, sums: dict[str, jax.Array], skipped: int) -> bool:
        """Takes a step's sums; True when it was time to look and they were fetched.

        Args:
            sums: see `steps.make_train_step`.
            skipped: clips of its batch that could not be read.
        """
        self._pending.append({**sums, "skipped": skipped})
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return False
        self.fetch()
        return True

    def fetch(self) -> None:
        """Waits for the device and checks the losses.

        Raises:
            FloatingPointError: a loss or a gradient is not finite.
        """
        for sums in jax.device_get(self._pending):
            if not (math.isfinite(sums["loss"]) and math.isfinite(sums["grad_norm"])):
                raise FloatingPointError(
                    "the training loss or its gradient is not finite: lower "
                    "config.optimizer.learning_rate or set config.optimizer.clip_norm; the last "
                    "checkpoint is from before"
                )
            for key in self.total:
                self.total[key] += float(sums[key])
        self._pending.clear()
        self._looked = time.monotonic()

    def means(self) -> dict[str, float]:
        """Loss and top1 over the clips trained on since `reset`, and how many could not be read.

        Empty where no clip was trained on.
        """
        clips = self.total["clips"]
        if not clips:
            return {}
        return {
            "loss": self.total["loss"] / clips,
            "top1": self.total["right"] / clips,
            "skipped_clips": int(self.total["skipped"]),
        }


def train_and_evaluate(config: ConfigDict, workdir: Path) -> None:
    """Trains a model, or goes on where `workdir` stands, evaluating as it goes.

    Args:
        config: checked, see `config.check_config`.
        workdir: takes checkpoints, `model.json`, `metrics.jsonl`, TensorBoard's files and the
            final evaluation.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the state is saved and the same command goes on.
        ValueError: config, data or checkpoint do not fit together.
        FileNotFoundError: data is missing.
        OSError: the workdir cannot be written.
        FloatingPointError: a loss is not finite.
    """
    checkpoint.check_writable(workdir)  # before the data, which may have to be drawn
    if config.test_after_training:
        _check_test_split(config)
    train_data = input_pipeline.get_dataset(config, "train")
    _check_labels(config, train_data)
    validation_data = input_pipeline.get_dataset(config, "validation")
    run = _Run(config, workdir, train_data, validation_data)
    description = checkpoint.describe_model(config, train_data.class_names)
    with (
        checkpoint.Checkpoints(workdir, description, keep=config.keep_checkpoints) as checkpoints,
        _StopRequest().listen() as stop,
    ):
        run.train(checkpoints, stop)
    train_data.close()
    validation_data.close()
    if config.test_after_training:
        record = evaluate.evaluate(config, workdir, "test", workdir)
        print(f"test: {_percentages(record)}, checkpoint of step {record['step']}")


def _check_labels(config: ConfigDict, data: Any) -> None:
    """Raises ValueError where model and loss do not fit the classes of the data."""
    if len(data.class_names) != config.model.num_classes:
        raise ValueError(
            f"{config.dataset.data_dir} has {len(data.class_names)} classes, but "
            f"config.model.num_classes={config.model.num_classes}: make them agree"
        )
    if data.multi_label != (config.loss.name == "binary_cross_entropy"):
        what = "several labels per clip" if data.multi_label else "one label per clip"
        instead = "binary_cross_entropy" if data.multi_label else "cross_entropy"
        raise ValueError(
            f"config.loss.name={config.loss.name}, but {config.dataset.data_dir} has {what}: set "
            f"it to {instead!r}"
        )


def _check_test_split(config: ConfigDict) -> None:
    """Raises now what would come after the whole training."""
    with contextlib.closing(input_pipeline.get_dataset(config, "test")) as test_data:
        if not test_data.has_labels:
            raise ValueError(
                "config.test_after_training=True, but the test split has no labels: set it to "
                "False; --mode=evaluate --split=test then gives predictions"
            )


class _Run:
    """A training run: what stays the same from step to step."""

    def __init__(self, config: ConfigDict, workdir: Path, train_data, validation_data):
        self.config, self.workdir = config, Path(workdir)
        self.train_data, self.validation_data = train_data, validation_data
        self.steps_per_epoch = train_data.steps_per_epoch
        self.total_steps = config.num_epochs * self.steps_per_epoch
        schedule = optimizer.learning_rate_schedule(
            config.optimizer, self.steps_per_epoch, config.num_epochs
        )
        model = RViT(config.model, rngs=nnx.Rngs(config.seed))
        transformation = optimizer.make_optimizer(config.optimizer, schedule)
        graphdef, self.initial_state = steps.create_train_state(model, transformation)
        loss_per_clip = losses.make_loss(config.loss)
        ragged = evaluate.is_ragged(config)
        train_step = steps.make_train_step(
            graphdef,
            transformation,
            loss_per_clip,
            seed=config.seed,
            ragged=ragged,
            augment=make_augment(config, train_data.class_names),
        )
        self.train_step = jax.jit(train_step, donate_argnums=0)
        eval_step = steps.make_eval_step(
            graphdef, loss_per_clip, ragged=ragged, multi_label=validation_data.multi_label
        )
        self.eval_step = jax.jit(eval_step)
        self.schedule = schedule

    def train(self, checkpoints: checkpoint.Checkpoints, stop: _StopRequest) -> None:
        """The loop; see `train_and_evaluate`."""
        state, step = self.initial_state, 0
        sums = _TrainingSums()
        restored = checkpoints.restore_latest(state)
        if restored is None and self.config.init_from:
            state, step = self._start_from_another(state)
        elif restored is not None:
            state, position = restored
            sums.total |= position.pop(TRAINING_SUMS, {})
            self.train_data.set_state(position)
            step = int(state.step)
            if step > self.total_steps:
                raise ValueError(
                    f"{self.workdir} is at step {step}, past the {self.total_steps} of "
                    f"config.num_epochs={self.config.num_epochs}: raise it, or take another "
                    "--workdir"
                )
            print(f"resuming {self.workdir} at step {step} of {self.total_steps}")
        records = Records(self.workdir)
        record = records.cut_back(step)
        with contextlib.closing(records), self._progress_bar(step) as bar:
            while True:
                if self._evaluation_is_due(step) and record is None:
                    sums.fetch()
                    record = self._validate(state, stop)
                    if record is not None:
                        means = sums.means()
                        records.write(record, {**means, "lr": float(self.schedule(step))})
                        self._report(bar, step, means, record)
                        sums.reset()
                if stop or step == self.total_steps or record is not None:
                    sums.fetch()  # a state whose loss is not finite is not saved
                    checkpoints.save(state, self._position(sums), record)
                if stop or step == self.total_steps:
                    checkpoints.wait()
                    if stop:
                        raise Interrupted(stop.signum)
                    return
                batch = next(self.train_data)
                state, step_sums = self.train_step(state, evaluate.on_device(batch))
                step, record = step + 1, None
                looked = sums.add(step_sums, evaluate.count_skipped(batch))
                if looked and (means := sums.means()):  # none yet, if every clip was skipped
                    bar.set_postfix_str(f"loss {means['loss']:.3f}, top1 {means['top1']:.1%}")
                bar.update(int(batch["mask"].sum()))
                every = self.config.checkpoint_every_steps
                if every and step % every == 0 and not self._evaluation_is_due(step):
                    sums.fetch()
                    checkpoints.save(state, self._position(sums), None)

    def _position(self, sums: _TrainingSums) -> dict[str, Any]:
        """Where the data stands, and what the next record has so far."""
        return {**self.train_data.get_state(), TRAINING_SUMS: sums.total}

    def _start_from_another(self, state: steps.TrainState) -> tuple[steps.TrainState, int]:
        """The state of `config.init_from`, and the step that it stands at."""
        start = initialise(self.config, state, self.steps_per_epoch)
        step = int(start.state.step)
        if step >= self.total_steps:
            raise ValueError(
                f"config.init_from={self.config.init_from} has {start.epochs} epochs behind it, "
                f"config.num_epochs={self.config.num_epochs}: raise it to train on"
            )
        position = {**self.train_data.get_state(), "position": step}
        self.train_data.set_state(position)
        print(f"starting from {self.config.init_from}: {'; '.join(start.notes)}")
        return start.state, step

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.evaluate_every_epochs * self.steps_per_epoch
        return step > 0 and (step % every == 0 or step == self.total_steps)

    def _validate(self, state: steps.TrainState, stop: _StopRequest) -> dict[str, Any] | None:
        """The validation record of a state; None when a signal came in between."""
        self.validation_data.rewind()
        result = evaluate.evaluate_split(
            self.eval_step,
            state.params,
            state.fixed,
            self.validation_data,
            num_classes=self.config.model.num_classes,
            multi_label=self.validation_data.multi_label,
            progress="validation",
            should_stop=lambda: bool(stop),
        )
        if result is None:
            return None
        step = int(state.step)
        folder = self.workdir / "checkpoints" / str(step)
        return evaluate.make_record(result, "validation", self.config, folder, step)

    def _report(self, bar: tqdm, step: int, training: dict[str, float], record) -> None:
        epoch = step / self.steps_per_epoch
        seen = (
            f"training loss {training['loss']:.4f}, top1 {training['top1']:.2%}; "
            if training  # nothing, where a resumed run begins with its evaluation
            else ""
        )
        bar.write(
            f"epoch {epoch:g}/{self.config.num_epochs}, step {step}: {seen}validation "
            f"{_percentages(record)}"
        )

    def _progress_bar(self, step: int) -> tqdm:
        clips = self.train_data.num_clips
        return tqdm(
            total=self.config.num_epochs * clips,
            initial=round(step / self.steps_per_epoch * clips),
            desc="training",
            unit="clip",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )


def _percentages(record: dict[str, Any]) -> str:
    if "mean_average_precision" in record:
        return f"loss {record['loss']:.4f}, mAP {record['mean_average_precision']:.2%}"
    return f"loss {record['loss']:.4f}, top1 {record['top1']:.2%}, top5 {record['top5']:.2%}"
