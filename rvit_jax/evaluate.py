"""Evaluation of one split: every clip once, padding masked, exact whatever the batch size.

Deviation: the reference shuffles the validation split, drops its last batch and divides by the
index of the last one.
"""

import csv
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
from rvit_jax import checkpoint, losses, steps
from rvit_jax.config import suggest
from rvit_jax.metrics import ClassificationMetrics

EvalStep = Callable[[nnx.State, nnx.State, steps.Batch], tuple[Array, Array]]
# What the compiled steps take of a batch; ids stay on the host.
DEVICE_KEYS = ("video", "label", "num_frames", "mask")


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """What a model answered on a split, clip by clip, in the split's order.

    Attributes:
        ids: clip ids.
        probabilities: [clips, K].
        label: [clips], -1 without labels.
        metrics: see `ClassificationMetrics.result`; None without labels.
        confusion: [K, K], true by predicted; None without labels.
    """

    ids: list[str]
    probabilities: np.ndarray
    label: np.ndarray
    metrics: dict[str, float | int] | None
    confusion: np.ndarray | None


def on_device(batch: dict[str, Any]) -> steps.Batch:
    """The arrays of a batch, sent to the device."""
    return jax.device_put({key: batch[key] for key in DEVICE_KEYS})


def evaluate_split(
    eval_step: EvalStep,
    params: nnx.State,
    fixed: nnx.State,
    dataset: Iterator[dict[str, Any]],
    *,
    num_classes: int,
    label_index: np.ndarray | None = None,
    progress: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SplitResult | None:
    """Runs a model over one pass of a data set.

    Args:
        eval_step: compiled, see `steps.make_eval_step`.
        params: the model's parameters.
        fixed: its other variables.
        dataset: one pass, see `input_pipeline.get_dataset`.
        num_classes: K of the model.
        label_index: [classes of the data set] -> the model's class index; the same by default.
        progress: text before the progress bar; none without.
        should_stop: asked before each batch.

    Returns:
        The result, or None when it was stopped.

    Raises:
        ValueError: logits that are not finite.
    """
    metrics = ClassificationMetrics(num_classes)
    ids, probabilities, labels = [], [], []
    bar = tqdm(
        total=dataset.num_clips,
        desc=progress,
        unit="clip",
        disable=progress is None,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    with bar:
        # Of the training data, which has no end, one epoch.
        for batch in itertools.islice(dataset, dataset.steps_per_epoch):
            if should_stop():
                return None
            mask, label = batch["mask"], batch["label"]
            if label_index is not None and dataset.has_labels:
                label = np.where(mask, label_index[label], 0).astype(np.int32)
            logits, loss = eval_step(params, fixed, on_device({**batch, "label": label}))
            logits = np.asarray(logits)
            if dataset.has_labels:
                metrics.update(logits, np.asarray(loss), label, mask)
            ids.extend(batch["id"][mask].tolist())
            probabilities.append(np.asarray(jax.nn.softmax(logits[mask], axis=-1)))
            labels.append(label[mask] if dataset.has_labels else np.full(mask.sum(), -1, np.int32))
            bar.update(int(mask.sum()))
    return SplitResult(
        ids=ids,
        probabilities=np.concatenate(probabilities),
        label=np.concatenate(labels),
        metrics=metrics.result() if dataset.has_labels else None,
        confusion=metrics.confusion if dataset.has_labels else None,
    )


def make_record(
    result: SplitResult, split: str, frame_order: str, path: str | os.PathLike, step: int
) -> dict[str, Any]:
    """One evaluation as one JSON object; fractions, not percent."""
    measured = result.metrics or {"num_clips": len(result.ids)}
    return {
        "split": split,
        **measured,
        "views": {"temporal": 1, "spatial": 1},
        "frame_order": frame_order,
        "checkpoint": os.fspath(path),
        "step": step,
        "skipped_clips": 0,
    }


def evaluate(
    config: ConfigDict,
    workdir: Path,
    split: str,
    checkpoint_path: str | os.PathLike,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates a checkpoint on a split of the config's data set and writes the results.

    Model, preprocessing and class names are the checkpoint's, data set and batch the config's;
    labels are matched by name. Files, in `WORKDIR/evaluation/`: `SPLIT.json` (the record),
    `SPLIT_predictions.csv` (a line per clip), `SPLIT_confusion.csv` (true by predicted).

    Args:
        config: of the run.
        workdir: where the results go.
        split: "train", "validation" or "test".
        checkpoint_path: see `checkpoint.load`.
        overrides: keys of `config` given on the command line; they win over the checkpoint's
            preprocessing, and contradict its model.

    Returns:
        The record.

    Raises:
        FileNotFoundError: no checkpoint, no data.
        ValueError: the checkpoint and the config contradict each other.
    """
    checkpoint.check_writable(workdir)
    loaded = checkpoint.load(checkpoint_path)
    config = use_checkpoint_config(config, loaded.config, overrides)
    dataset = input_pipeline.get_dataset(config, split)
    module = loaded.model.module
    graphdef, params, fixed = nnx.split(module, nnx.Param, ...)
    eval_step = jax.jit(
        steps.make_eval_step(graphdef, losses.make_loss(config.loss), ragged=is_ragged(config))
    )
    result = evaluate_split(
        eval_step,
        params,
        fixed,
        dataset,
        num_classes=len(loaded.class_names),
        label_index=(
            match_labels(dataset.class_names, loaded.class_names) if dataset.has_labels else None
        ),
        progress=f"evaluating {split}",
    )
    dataset.close()
    record = make_record(result, split, config.dataset.frame_order, loaded.path, loaded.step)
    write_results(workdir, record, result, loaded.class_names)
    return record


def is_ragged(config: ConfigDict) -> bool:
    """Whether the clips of a batch may differ in `num_frames`."""
    return config.dataset.short_clips == "ragged"


def use_checkpoint_config(
    config: ConfigDict, trained: ConfigDict, overrides: Sequence[str]
) -> ConfigDict:
    """`config` with the model and the preprocessing that a checkpoint was trained with.

    Raises:
        ValueError: the command line asks for another model.
    """
    config = config.copy_and_resolve_references()
    for key in overrides:
        section, _, name = key.partition(".")
        if section == "model" and trained.model.get(name) != config.model[name]:
            raise ValueError(
                f"--config.{key}={config.model[name]!r} contradicts the checkpoint, which was "
                f"trained with {trained.model.get(name)!r}: leave it out"
            )
    config.model = trained.model.copy_and_resolve_references()
    for name in checkpoint.PREPROCESSING_KEYS:
        if f"dataset.{name}" not in overrides:
            config.dataset[name] = trained.dataset[name]
    return config


def match_labels(dataset_names: Sequence[str], model_names: Sequence[str]) -> np.ndarray:
    """[classes of the data set] -> class index of the model, by name.

    Raises:
        ValueError: the model does not know a class.
    """
    unknown = [name for name in dataset_names if name not in model_names]
    if unknown:
        raise ValueError(
            f"the data set has {len(unknown)} classes that the checkpoint does not know, "
            f"{unknown[0]!r} among them{suggest(unknown[0], model_names)} Choose the classes with "
            "--config.dataset.classes=\"('NAME', 'NAME')\""
        )
    return np.array([model_names.index(name) for name in dataset_names], np.int32)


def write_results(
    workdir: Path, record: dict[str, Any], result: SplitResult, class_names: Sequence[str]
) -> None:
    """Writes a split's record, predictions and confusion under `WORKDIR/evaluation/`."""
    folder = Path(workdir) / "evaluation"
    stem = record["split"]
    if record["frame_order"] != "forward":
        stem += f"_{record['frame_order']}"
    checkpoint.write_json(folder / f"{stem}.json", record)
    predicted = result.probabilities.argmax(axis=-1)
    rows = [("id", "predicted", "probability", "label")]
    for clip_id, row, index, label in zip(
        result.ids, result.probabilities, predicted, result.label, strict=True
    ):
        name = class_names[label] if label >= 0 else ""
        rows.append((clip_id, class_names[index], f"{row[index]:.6f}", name))
    _write_csv(folder / f"{stem}_predictions.csv", rows)
    if result.confusion is not None:
        table = zip(class_names, result.confusion.tolist(), strict=True)
        header = ("true \\ predicted", *class_names)
        _write_csv(folder / f"{stem}_confusion.csv", [header, *((n, *row) for n, row in table)])


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    os.replace(aside, path)


def print_record(record: dict[str, Any]) -> None:
    """The record as one JSON line, the last on stdout."""
    print(json.dumps(record), flush=True)
