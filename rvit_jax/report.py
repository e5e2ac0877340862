"""The page about an evaluation: one file that needs nothing beside it, and runs nothing.

Figures, films and styles lie in the page. It is written from `report.html.jinja`; whatever comes
from data (class names, clip ids, paths) is escaped there.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jinja2
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline.files import written_aside
from rvit_jax import figures
from rvit_jax.version import __version__

if TYPE_CHECKING:
    from rvit_jax.checkpoint import LoadedModel
    from rvit_jax.evaluate import Clip, SplitResult

FILM_HEIGHT = 160  # pixels; smaller frames are enlarged
CONFUSED_PAIRS = 10
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class _Picture:
    """An image for light pages and one for dark ones, as data URIs."""

    light: str
    dark: str
    width: int
    height: int


def write_report(
    workdir: Path,
    record: dict[str, Any],
    result: SplitResult,
    measured: dict[str, Any] | None,
    config: ConfigDict,
    loaded: LoadedModel,
) -> Path:
    """Writes `WORKDIR/evaluation/report.html`, of the split that was evaluated last.

    Controls (`config.dataset.frame_order`) have a page of their own, `report_shuffled.html`.

    Args:
        workdir: where the results are.
        record: see `evaluate.make_record`.
        result: of the split.
        measured: see `anytime.measure`; None where it was not.
        config: that the split was read with.
        loaded: the model.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(workdir) / "evaluation"
    suffix = "" if record["frame_order"] == "forward" else f"_{record['frame_order']}"
    path = folder / f"report{suffix}.html"
    names = loaded.class_names
    training = _training_records(loaded.path, loaded.step)
    by_class = any("mean_average_precision" in line for line in training)
    accuracy = "mean_average_precision" if by_class else "top1"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    page = environment.get_template("report.html.jinja").render(
        model_name=Path(os.path.abspath(workdir)).name,
        record=record,
        standard_error=_standard_error(record),
        others=_other_records(folder, record),
        measured=measured,
        few_clips=figures.FEW_CLIPS,
        mean_frames=float(result.answers.num_frames.mean())
        if measured and result.answers
        else None,
        classes=_per_class(result.confusion, names) if result.confusion is not None else [],
        pairs=_confused(result.confusion, names) if result.confusion is not None else [],
        training=(
            [_picture(figures.training_curve, training, key) for key in ("loss", accuracy)]
            if training
            else []
        ),
        anytime=_picture(figures.anytime_curve, measured) if measured else None,
        reliability=_picture(figures.reliability, measured) if measured else None,
        calibration_error=_picture(figures.calibration_error, measured) if measured else None,
        confusion=(
            _picture(figures.confusion, result.confusion, names)
            if result.confusion is not None
            else None
        ),
        worst=[_worst_clip(clip, names, config) for clip in result.worst],
        protocol=_protocol(record, config, loaded),
        config=json.dumps(json.loads(config.to_json_best_effort()), indent=2),
    )
    with written_aside(path) as aside:
        # A clip's id may be a file name that is no UTF-8.
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}\u00a0%"  # never broken


def _standard_error(record: dict[str, Any]) -> float | None:
    """Of top-1, from the number of clips; None where it would be 0, which says nothing."""
    if not 0.0 < record.get("top1", 0.0) < 1.0:
        return None
    return math.sqrt(record["top1"] * (1 - record["top1"]) / record["num_clips"])


def _training_records(checkpoint: Path, step: int) -> list[dict[str, Any]]:
    """The run's records up to the checkpoint; none for a model that was not trained here."""
    checkpoint = checkpoint.absolute()
    file = checkpoint.parent.parent / "metrics.jsonl"
    if checkpoint.parent.name != "checkpoints" or not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # its writing was cut off; resuming drops it too
            continue
        whole = _has_numbers(record, ("step", "loss")) and (
            _has_numbers(record, ("top1",)) or _has_numbers(record, ("mean_average_precision",))
        )
        if whole and record["step"] <= step and isinstance(record.get("training", {}), dict):
            records.append(record)
    return records


def _has_numbers(record: Any, keys: Sequence[str]) -> bool:
    """Whether a JSON value is an object with numbers at these keys."""
    return isinstance(record, dict) and all(
        isinstance(record.get(key), int | float) for key in keys
    )


def _other_records(folder: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """What else was evaluated into the same folder."""
    others = []
    for file in sorted(folder.glob("*.json")):
        try:
            other = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if _has_numbers(other, ("top1", "loss", "num_clips", "step")) and all(
            isinstance(other.get(key), str) for key in ("split", "frame_order")
        ):
            same = all(other[key] == record[key] for key in ("split", "frame_order"))
            others += [] if same else [other]
    return others


def _per_class(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per class, the worst recall first; classes without a clip come last."""
    rows = []
    for index, name in enumerate(names):
        clips, predicted = confusion[index].sum(), confusion[:, index].sum()
        right = confusion[index, index]
        mistaken = np.where(np.arange(len(names)) == index, 0, confusion[index])
        worst = int(mistaken.argmax())
        rows.append(
            {
                "name": name,
                "clips": int(clips),
                "recall": float(right / clips) if clips else None,
                "precision": float(right / predicted) if predicted else None,
                "mistaken_for": names[worst] if mistaken[worst] else None,
                "times": int(mistaken[worst]),
            }
        )
    return sorted(rows, key=lambda row: (row["recall"] is None, row["recall"] or 0.0))


def _confused(confusion: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent mistakes."""
    mistakes = confusion * (1 - np.eye(len(names), dtype=confusion.dtype))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = [np.unravel_index(flat, mistakes.shape) for flat in order]
    return [
        {
            "true": names[row],
            "predicted": names[column],
            "clips": int(mistakes[row, column]),
            "share": float(mistakes[row, column] / confusion[row].sum()),
        }
        for row, column in pairs
        if mistakes[row, column]
    ]


def _worst_clip(clip: Clip, names: Sequence[str], config: ConfigDict) -> dict[str, Any]:
    order = np.argsort(-clip.probabilities, kind="stable")[:3]
    rate = config.dataset.frame_rate / config.dataset.frame_stride
    film, still, size = _film(clip.video, rate)
    return {
        "id": clip.id,
        "label": names[clip.label] if clip.label >= 0 else None,
        "top": [(names[index], float(clip.probabilities[index])) for index in order],
        "film": film,
        "still": still,
        "width": size[0],
        "height": size[1],
        "num_frames": len(clip.video),
    }


def _film(video: np.ndarray, frame_rate: float) -> tuple[str, str, tuple[int, int]]:
    """An animated and a still WebP of a clip uint8 [T, H, W, 3], and their (width, height)."""
    scale = max(1, round(FILM_HEIGHT / video.shape[1]))
    size = (video.shape[2] * scale, video.shape[1] * scale)
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in video]
    film, still = io.BytesIO(), io.BytesIO()
    frames[0].save(
        film,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / frame_rate),
        loop=0,
        quality=60,
    )
    frames[len(frames) // 2].save(still, "WEBP", quality=60)
    return _data_uri("image/webp", film.getvalue()), _data_uri("image/webp", still.getvalue()), size


def _picture(draw: Callable[..., Figure], *arguments: Any) -> _Picture:
    light, dark = (draw(*arguments, theme) for theme in (figures.LIGHT, figures.DARK))
    width, height = (round(96 * inches) for inches in light.get_size_inches())  # CSS pixels
    light_uri, dark_uri = (
        _data_uri("image/svg+xml", figures.as_svg(figure)) for figure in (light, dark)
    )
    return _Picture(light_uri, dark_uri, width, height)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _protocol(
    record: dict[str, Any], config: ConfigDict, loaded: LoadedModel
) -> list[tuple[str, str]]:
    """What somebody else needs to get the same figures."""
    dataset, model = config.dataset, config.model
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [
        ("checkpoint", f"{loaded.path} (step {loaded.step})"),
        ("data", f"{dataset.name} in {dataset.data_dir}, split {record['split']}"),
        (
            "clips",
            f"{record['num_clips']}, each once; {record['skipped_clips']} could not be read, "
            f"{record['missing_clips']} are missing",
        ),
        (
            "frames of a clip",
            f"{dataset.num_frames}, every {_ordinal(dataset.frame_stride)} of the video, sampling "
            f"{dataset.sampling}, short clips {dataset.short_clips}, packing "
            f"{dataset.frame_packing}, order {dataset.frame_order}",
        ),
        ("views", f"{record['views']['temporal']} temporal x {record['views']['spatial']} spatial"),
        (
            "model",
            f"{model.image_size} px, patch {model.patch_size}, D {model.hidden_size}, "
            f"{model.num_layers} layers, {model.num_heads} heads, {model.attention} attention, "
            f"read-out {model.readout}, {model.head} head",
        ),
        ("batch", str(config.batch_size)),
        ("device", f"{len(jax.devices())} x {device.device_kind} ({device.platform})"),
        ("versions", f"rvit_jax {__version__}, Python {platform.python_version()}, {versions}"),
        ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def _ordinal(number: int) -> str:
    return {1: "one", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")
