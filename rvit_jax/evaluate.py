"""Evaluation of one split: every clip once, padding masked, exact whatever the batch size.

batch -> logits after every frame -> metrics, anytime accuracy -> JSON, CSV, pictures, a page

Deviation: the reference shuffles the validation split, drops its last batch and divides by the
index of the last one.
"""

import csv
import dataclasses
import heapq
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
from input_pipeline import files
from input_pipeline.command_line import suggest
from input_pipeline.source import few
from rvit_jax import anytime, checkpoint, distributed, losses, sharding, steps
from rvit_jax.metrics import ClassificationMetrics, MultiLabelMetrics

if TYPE_CHECKING:
    from input_pipeline.loader import BatchIterator

EvalStep = Callable[[steps.State, steps.State, steps.Batch], tuple[Array, Array]]
HOST_KEYS = ("label", "num_frames", "mask", "id")  # of a batch: what its results need
WORST_CLIPS = 12  # that the report shows


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip and what the model made of it.

    Attributes:
        id: of the clip.
        video: uint8 [num_frames, H, W, 3], as the model saw it.
        probabilities: [K], after the last frame.
        label: the true class's index, -1 without labels.
    """

    id: str
    video: np.ndarray
    probabilities: np.ndarray
    label: int

    @property
    def doubt(self) -> float:
        """How bad the answer is, 0 to 1: what the true class lacks; unlabelled, the likeliest."""
        wanted = self.label if self.label >= 0 else self.probabilities.argmax()
        return float(1.0 - self.probabilities[wanted])


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """What a model answered on a split, clip by clip, in the split's order.

    Attributes:
        ids: clip ids.
        probabilities: [clips, K].
        label: [clips], -1 without labels; of several labels per clip [clips, K] of 0 and 1.
        metrics: see `ClassificationMetrics.result` and `MultiLabelMetrics.result`; None without
            labels.
        confusion: [K, K], true by predicted; None without labels or with several per clip.
        num_skipped: clips that could not be read (`config.dataset.on_error="skip"`).
        num_missing: clips that are not there and were left out (`config.dataset.missing="skip"`).
        answers: after every frame; None without one label per clip, or where not asked for.
        worst: the clips with the worst answers, the worst first; empty unless asked for.
    """

    ids: list[str]
    probabilities: np.ndarray
    label: np.ndarray
    metrics: dict[str, float | int] | None
    confusion: np.ndarray | None
    num_skipped: int = 0
    num_missing: int = 0
    answers: anytime.Answers | None = None
    worst: tuple[Clip, ...] = ()


def on_device(batch: dict[str, Any]) -> steps.Batch:
    """The arrays of a batch, sent to the device; see `sharding.Layout.send` for several."""
    return jax.device_put({key: batch[key] for key in sharding.DEVICE_KEYS})


def evaluate_split(
    eval_step: EvalStep,
    params: steps.State,
    fixed: steps.State,
    dataset: "BatchIterator",
    *,
    num_classes: int,
    multi_label: bool = False,
    label_index: np.ndarray | None = None,
    num_worst: int = 0,
    progress: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    send: Callable[[dict[str, Any]], steps.Batch] = on_device,
) -> SplitResult | None:
    """Runs a model over one pass of a data set.

    Args:
        eval_step: compiled, see `steps.make_eval_step`; or `steps.make_anytime_step`, which gives
            the answers after every frame.
        params: the model's parameters.
        fixed: its other variables.
        dataset: one pass, see `input_pipeline.get_dataset`.
        num_classes: K of the model.
        multi_label: a clip may have several labels: each class is for itself.
        label_index: [classes of the data set] -> the model's class index; the same by default.
        num_worst: clips to keep for `SplitResult.worst`.
        progress: text before the progress bar; none without.
        should_stop: asked before each batch; of several processes all must be told the same.
        send: puts a batch on the devices. Of several processes each has some rows of it, and
            `eval_step` gives the logits of all.

    Returns:
        The result, of all processes on each; None when it was stopped.

    Raises:
        ValueError: logits that are not finite.
    """
    results = _Results(num_classes, dataset.has_labels, multi_label, num_worst)
    bar = tqdm(
        total=dataset.num_clips,
        desc=progress,
        unit="clip",
        disable=progress is None or not distributed.is_first(),
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    with bar:
        for batch in dataset:
            if should_stop():
                return None
            if label_index is not None and dataset.has_labels:
                batch = {**batch, "label": _reindex(batch, label_index, num_classes)}
            logits, loss = (np.asarray(x) for x in eval_step(params, fixed, send(batch)))
            batch = {**batch, **distributed.gather_rows({key: batch[key] for key in HOST_KEYS})}
            if multi_label and label_index is not None:
                # What is left out of the data set is not known to be absent.
                loss = _mean_loss(logits[:, label_index], batch["label"][:, label_index])
            results.add(batch, logits, loss)
            bar.update(int(batch["mask"].sum()))
    return dataclasses.replace(results.result(), num_missing=dataset.num_missing)


def _reindex(batch: dict[str, Any], label_index: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels in the model's order of classes."""
    if batch["label"].ndim == 1:
        return np.where(batch["mask"], label_index[batch["label"]], 0).astype(np.int32)
    label = np.zeros((len(batch["label"]), num_classes), np.float32)
    label[:, label_index] = batch["label"]
    return label


def _mean_loss(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """`losses.binary_cross_entropy` of some classes: [B] of [B, n]."""
    return (np.logaddexp(0.0, logits) - logits * label).mean(axis=-1)


class _Results:
    """Collects what `SplitResult` holds, batch by batch."""

    def __init__(self, num_classes: int, has_labels: bool, multi_label: bool, num_worst: int):
        self._has_labels, self._multi_label, self._num_worst = has_labels, multi_label, num_worst
        self._metrics = MultiLabelMetrics() if multi_label else ClassificationMetrics(num_classes)
        self._num_skipped = 0
        self._ids: list[str] = []
        self._probabilities: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._answers: list[anytime.Answers] = []
        self._worst: list[tuple[int, Clip]] = []  # and the clip's number in the split

    def add(self, batch: dict[str, Any], logits: np.ndarray, loss: np.ndarray) -> None:
        """Takes a batch; its logits are [B, K], or [B, T, K] after every frame.

        Of several processes each has the videos of its own rows alone.
        """
        mask, num_frames = batch["mask"], batch["num_frames"]
        self._num_skipped += count_skipped(batch)
        if not mask.any():
            return
        by_frame = None
        if logits.ndim == 3:
            by_frame, logits = logits, logits[np.arange(len(mask)), num_frames - 1]
        label = np.full(mask.sum(), -1, np.int32)
        if self._has_labels:
            self._metrics.update(logits, loss, batch["label"], mask)
            label = batch["label"][mask]
            if by_frame is not None:
                every = np.asarray(jax.nn.softmax(by_frame[mask], axis=-1))
                answers = anytime.Answers.from_probabilities(every, num_frames[mask], label)
                self._answers.append(answers)
        to_probabilities = jax.nn.sigmoid if self._multi_label else jax.nn.softmax
        probabilities = np.asarray(to_probabilities(logits[mask]))
        if self._num_worst:
            first = distributed.process_index() * len(batch["video"])
            clips = [
                (
                    number,
                    Clip(str(batch["id"][row]), _first_view(batch, row, first), answer, int(k)),
                )
                for number, (row, answer, k) in enumerate(
                    zip(np.flatnonzero(mask).tolist(), probabilities, label, strict=True),
                    start=len(self._ids),
                )
                if 0 <= row - first < len(batch["video"])
            ]
            # Copied, or a clip that is kept would keep its batch.
            self._worst = [
                (number, dataclasses.replace(clip, video=clip.video.copy()))
                for number, clip in _take_worst([*self._worst, *clips], self._num_worst)
            ]
        self._ids.extend(batch["id"][mask].tolist())
        self._probabilities.append(probabilities)
        self._labels.append(label)

    def result(self) -> SplitResult:
        """All of it.

        Raises:
            ValueError: no clip could be read.
        """
        if not self._ids:
            raise ValueError(
                f"none of the {self._num_skipped} clips could be read: see the warnings, or set "
                "config.dataset.on_error='fail'"
            )
        labelled = self._has_labels
        return SplitResult(
            ids=self._ids,
            probabilities=np.concatenate(self._probabilities),
            label=np.concatenate(self._labels),
            metrics=self._metrics.result() if labelled else None,
            confusion=(
                self._metrics.confusion
                if labelled and isinstance(self._metrics, ClassificationMetrics)
                else None
            ),
            num_skipped=self._num_skipped,
            answers=anytime.Answers.concatenate(self._answers) if self._answers else None,
            worst=tuple(
                clip for _, clip in _take_worst(_gather_clips(self._worst), self._num_worst)
            ),
        )


def count_skipped(batch: dict[str, Any]) -> int:
    """Clips of a batch that could not be read: masked, as padding is, but with an id."""
    return int((~batch["mask"] & (batch["id"] != "")).sum())


def _take_worst(clips: list[tuple[int, Clip]], most: int) -> list[tuple[int, Clip]]:
    """The worst first; of equals the one that comes first in the split."""
    return heapq.nsmallest(most, clips, key=lambda pair: (-pair[1].doubt, pair[0]))


def _gather_clips(clips: list[tuple[int, Clip]]) -> list[tuple[int, Clip]]:
    """Those of all processes."""
    arrays: dict[str, np.ndarray] = {}
    for index, (number, clip) in enumerate(clips):
        for field, value in {"number": number, **vars(clip)}.items():
            arrays[f"{index}/{field}"] = np.asarray(value)
    gathered = []
    for part in distributed.gather_arrays(arrays):
        for index in range(len(part) // 5):
            place, clip_id, video, probabilities, label = (
                part[f"{index}/{field}"]
                for field in ("number", "id", "video", "probabilities", "label")
            )
            gathered.append((int(place), Clip(str(clip_id), video, probabilities, int(label))))
    return gathered


def _first_view(batch: dict[str, Any], row: int, first: int) -> np.ndarray:
    """A clip's real frames, uint8 [num_frames, H, W, 3]; of several views the first.

    `first` is the row of the first video that is here.
    """
    video, num_frames = batch["video"][row - first], batch["num_frames"][row]
    if video.ndim == 5:
        video, num_frames = video[0], num_frames[0]
    return video[:num_frames]


def make_record(
    result: SplitResult, split: str, config: ConfigDict, path: str | os.PathLike[str], step: int
) -> dict[str, Any]:
    """One evaluation as one JSON object; fractions, not percent."""
    measured = result.metrics or {"num_clips": len(result.ids)}
    return {
        "split": split,
        **measured,
        "views": config.views.to_dict(),
        "frame_order": config.dataset.frame_order,
        "checkpoint": os.fspath(path),
        "step": step,
        "skipped_clips": result.num_skipped,
        "missing_clips": result.num_missing,
    }


def evaluate(
    config: ConfigDict,
    workdir: Path,
    split: str,
    checkpoint_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates a checkpoint on a split of the config's data set and writes the results.

    Model, preprocessing and class names are the checkpoint's, data set and batch the config's;
    labels are matched by name. See `write_results` for the files.

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
    from rvit_jax import report

    checkpoint.check_writable(workdir, "evaluation")
    loaded = checkpoint.load(checkpoint_path)
    config = use_checkpoint_config(config, loaded.config, overrides)
    layout = sharding.make_layout(config)
    parts = distributed.part_of_batches()
    dataset = input_pipeline.get_dataset(config, split, training=False, **parts)
    multi_label = config.loss.name == "binary_cross_entropy"
    if dataset.has_labels and dataset.multi_label != multi_label:
        raise ValueError(
            f"config.loss.name={config.loss.name}, but the clips of {config.dataset.data_dir} have "
            f"{'several labels' if dataset.multi_label else 'one label'} each: take the config "
            "that the model was trained with"
        )
    module = loaded.model.module
    module.schedule, module.segment_frames = config.model.schedule, config.model.segment_frames
    graphdef, params, *(fixed,) = nnx.split(module, nnx.Param, ...)
    result = evaluate_split(
        layout.compile_whole(_choose_step(config, graphdef)),
        layout.place(params, whole=True),
        layout.place(fixed, whole=True),
        dataset,
        num_classes=len(loaded.class_names),
        label_index=(
            match_labels(dataset.class_names, loaded.class_names) if dataset.has_labels else None
        ),
        multi_label=multi_label,
        num_worst=0 if multi_label else WORST_CLIPS,
        progress=f"evaluating {split}",
        send=layout.send,
    )
    dataset.close()
    assert result is not None  # nothing stops it
    record = make_record(result, split, config, loaded.path, loaded.step)
    measured = None
    if result.answers is not None:
        measured = anytime.measure(result.answers, seconds_per_frame(config))
        record["anytime_area"] = measured["area"]
        record["expected_calibration_error"] = measured["by_fraction"][
            "expected_calibration_error"
        ][-1]
    if distributed.is_first():
        write_results(workdir, record, result, measured, loaded.class_names)
        report.write_report(workdir, record, result, measured, config, loaded)
    return record


def _choose_step(config: ConfigDict, graphdef: nnx.GraphDef[Any]) -> EvalStep:
    """The step that answers after every frame, or at the end alone.

    There is no one answer before the clip is over where frames hold colours of other moments, a
    clip has several labels, or an answer is that of several clips.
    """
    loss_per_clip = losses.make_loss(config.loss)
    multi_label = config.loss.name == "binary_cross_entropy"
    scrambled = config.dataset.frame_packing == "channel_planes"
    if scrambled or multi_label or max(config.views.values()) > 1:
        return steps.make_eval_step(
            graphdef, loss_per_clip, ragged=is_ragged(config), multi_label=multi_label
        )
    return steps.make_anytime_step(graphdef, loss_per_clip)


def seconds_per_frame(config: ConfigDict) -> float | None:
    """From one frame that the model reads to the next; None where clips differ in it."""
    if config.dataset.sampling in ("uniform", "random"):
        return None
    return config.dataset.frame_stride / config.dataset.frame_rate


def is_ragged(config: ConfigDict) -> bool:
    """Whether the clips of a batch may differ in `num_frames`."""
    return config.dataset.short_clips == "ragged"


def use_checkpoint_config(
    config: ConfigDict, trained: ConfigDict, overrides: Sequence[str]
) -> ConfigDict:
    """`config` with the model and the preprocessing that a checkpoint was trained with.

    Of the model, what changes no number (`checkpoint.FREE_KEYS`) may be asked for.

    Raises:
        ValueError: the command line asks for another model.
    """
    config = config.copy_and_resolve_references()
    free = {}
    for key in overrides:
        section, _, name = key.partition(".")
        if section == "model" and key in checkpoint.FREE_KEYS:
            free[name] = config.model[name]
        elif section == "model" and trained.model.get(name) != config.model[name]:
            raise ValueError(
                f"--config.{key}={config.model[name]!r} contradicts the checkpoint, which was "
                f"trained with {trained.model.get(name)!r}: leave it out"
            )
    config.model = trained.model.copy_and_resolve_references()
    config.model.update(free)
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
    if unknown and list(model_names) == [f"class {index}" for index in range(len(model_names))]:
        raise ValueError(
            f"the checkpoint does not know the names of its {len(model_names)} classes, for a "
            "PyTorch file has none: convert it again with python -m weights_converter to_flax ... "
            f"--class_names=FILE, a name on each line in the order of its outputs; the data has "
            f"{few(dataset_names)}"
        )
    if unknown:
        hint = suggest(unknown[0], model_names)
        raise ValueError(
            f"the data set has {len(unknown)} classes that the checkpoint does not know, "
            f"{unknown[0]!r} among them{hint}{'' if hint.endswith('?') else '.'} Choose the "
            "classes with --config.dataset.classes=\"('NAME', 'NAME')\"; or, where a converted "
            "model has wrong names, convert it again with --class_names=FILE"
        )
    return np.array([model_names.index(name) for name in dataset_names], np.int32)


def write_results(
    workdir: Path,
    record: dict[str, Any],
    result: SplitResult,
    measured: dict[str, Any] | None,
    class_names: Sequence[str],
) -> None:
    """Writes a split's figures under `WORKDIR/evaluation/`.

    `SPLIT.json` (the record), `SPLIT_predictions.csv` (a line per clip), `SPLIT_confusion.csv`
    (true by predicted), and for `measured` (see `anytime.measure`) `SPLIT_anytime.json` and
    pictures: `SPLIT_anytime.png`, `SPLIT_reliability.png`, `SPLIT_calibration_error.png`. Controls
    have `_shuffled` or `_single` behind SPLIT.
    """
    from rvit_jax import figures  # brings matplotlib, which training does without

    folder = Path(workdir) / "evaluation"
    stem = record["split"]
    if record["frame_order"] != "forward":
        stem += f"_{record['frame_order']}"
    files.write_json(folder / f"{stem}.json", record)
    if measured is not None:
        files.write_json(folder / f"{stem}_anytime.json", measured)
        figures.write_png(figures.anytime_curve(measured), folder / f"{stem}_anytime.png")
        figures.write_png(figures.reliability(measured), folder / f"{stem}_reliability.png")
        figures.write_png(
            figures.calibration_error(measured), folder / f"{stem}_calibration_error.png"
        )
    # What an earlier evaluation of the split left, and this one has not, would belie it.
    stale = {
        ("_anytime.json", "_anytime.png", "_reliability.png", "_calibration_error.png"): measured,
        ("_confusion.csv",): result.confusion,
    }
    for endings, now in stale.items():
        for ending in endings if now is None else ():
            (folder / f"{stem}{ending}").unlink(missing_ok=True)
    predicted = result.probabilities.argmax(axis=-1).tolist()
    rows = [("id", "predicted", "probability", "label")]
    for clip_id, row, index, label in zip(
        result.ids, result.probabilities, predicted, result.label, strict=True
    ):
        if np.ndim(label):
            name = " | ".join(class_names[k] for k in np.flatnonzero(label).tolist())
        else:
            name = class_names[int(label)] if label >= 0 else ""
        rows.append((clip_id, class_names[index], f"{row[index]:.6f}", name))
    _write_csv(folder / f"{stem}_predictions.csv", rows)
    if result.confusion is not None:
        table = zip(class_names, result.confusion.tolist(), strict=True)
        header = ("true \\ predicted", *class_names)
        _write_csv(folder / f"{stem}_confusion.csv", [header, *((n, *row) for n, row in table)])


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with (
        files.written_aside(path) as aside,
        aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file, delimiter=";").writerows(rows)


def print_record(record: dict[str, Any]) -> None:
    """The record as one JSON line, the last on stdout."""
    print(json.dumps(record), flush=True)
