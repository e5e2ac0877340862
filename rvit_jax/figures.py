"""Figures of training and evaluation, drawn by matplotlib without a display.

Each function returns a Figure; `write_png` and `as_svg` say where it goes. A report shows every
figure in two themes, for light and for dark pages.
"""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from input_pipeline.files import written_aside

MOST_NAMES = 60  # classes whose names are written beside a confusion matrix
FEW_CLIPS = 10  # of a bin: its accuracy is little more than chance


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        text: of letters and axes.
        grid: of lines behind the data.
        background: of the page that it is for.
        series: of data; told apart by eyes that see no red or no green too.
    """

    text: str
    grid: str
    background: str
    series: tuple[str, str, str]


LIGHT = Theme("#1d2329", "#d8dde3", "#ffffff", ("#0067a5", "#c8590c", "#1a7f5a"))
DARK = Theme("#e4e8ec", "#3a4149", "#14181c", ("#58a8e8", "#f0a050", "#56c79a"))


def training_curve(records: Sequence[dict[str, Any]], key: str, theme: Theme = LIGHT) -> Figure:
    """A figure by step, of training and of validation.

    Args:
        records: lines of `metrics.jsonl`, at least one.
        key: "loss", "top1" or "mean_average_precision".
        theme: colours.
    """
    figure, axes = _figure(theme)
    for colour, name in zip(theme.series, ("validation", "training"), strict=False):
        points = [
            (record["step"], values[key])
            for record in records
            if key in (values := record if name == "validation" else record.get(name, {}))
        ]
        if points:
            marker = "o" if len(points) < 40 else None
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=3, label=name)
    names = {"loss": "loss [nats]", "top1": "top-1", "mean_average_precision": "mAP"}
    axes.set(xlabel="step", ylabel=names[key])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if key != "loss":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes, theme)
    return figure


def anytime_curve(measured: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """Top-1 against the frames seen, and rules that stop early where they come to lie.

    Args:
        measured: see `anytime.measure`.
        theme: colours.
    """
    figure, axes = _figure(theme, width=5.6, height=3.8)
    by_frame = measured["by_frame"]
    axes.plot(
        by_frame["mean_frames"],
        by_frame["top1"],
        color=theme.series[0],
        marker="o" if len(by_frame["frames"]) < 80 else None,
        ms=3,
        label="every clip stopped after so many frames",
    )
    _plot_rule(axes, measured, "confidence", "stopped at a confidence of", theme.series[1])
    _plot_rule(axes, measured, "patience", "stopped after so many equal answers", theme.series[2])
    seconds = measured["seconds_per_frame"]
    interval = f" (one every {1000 * seconds:.0f} ms)" if seconds else ""
    axes.set(xlabel=f"frames seen, mean{interval}", ylabel="top-1", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    _legend(axes, theme)
    return figure


def _plot_rule(axes: Axes, measured: dict[str, Any], rule: str, words: str, colour: str) -> None:
    # One that hardly ever stops says nothing that the curve's end does not.
    rows = [
        row for row in measured["early_exit"] if row["rule"] == rule and row["stopped_early"] > 0.01
    ]
    if not rows:
        return
    by_confidence = rule == "confidence"
    x, y = ([row[key] for row in rows] for key in ("mean_frames", "top1"))
    marker = "s" if by_confidence else "^"
    axes.plot(x, y, color=colour, marker=marker, ms=5, ls=":", lw=1, label=words)
    for row in rows:
        axes.annotate(
            f"{row['value']:.0%}" if by_confidence else str(row["value"]),
            (row["mean_frames"], row["top1"]),
            xytext=(-5, 4) if by_confidence else (5, -9),
            ha="right" if by_confidence else "left",
            textcoords="offset points",
            color=colour,
            fontsize=7,
        )


def reliability(measured: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """Accuracy against confidence, after the last frame. Bins of few clips are faint.

    Args:
        measured: see `anytime.measure`.
        theme: colours.
    """
    figure, axes = _figure(theme)
    bins = measured["calibration"]
    count = len(bins["clips"])
    edges = np.arange(count) / count
    accuracy = np.array([value or 0.0 for value in bins["accuracy"]])  # none in an empty bin
    many = np.array(bins["clips"]) >= FEW_CLIPS
    for which, alpha, label in ((many, 0.9, "accuracy"), (~many, 0.3, None)):
        axes.bar(
            edges[which],
            accuracy[which],
            1 / count,
            align="edge",
            color=theme.series[0],
            alpha=alpha,
            label=label,
        )
    axes.plot([0, 1], [0, 1], color=theme.text, ls="--", lw=1, label="confidence")
    shares = np.array(bins["clips"]) / max(sum(bins["clips"]), 1)
    axes.step(
        [*edges, 1.0],
        [*shares, shares[-1]],
        where="post",
        color=theme.series[1],
        lw=1.5,
        label="share of the clips",
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, 0))
    _legend(axes, theme)
    return figure


def calibration_error(measured: dict[str, Any], theme: Theme = LIGHT) -> Figure:
    """Expected calibration error against the part of each clip seen.

    Args:
        measured: see `anytime.measure`.
        theme: colours.
    """
    figure, axes = _figure(theme)
    by_fraction = measured["by_fraction"]
    axes.plot(
        by_fraction["fraction"],
        by_fraction["expected_calibration_error"],
        color=theme.series[0],
        marker="o",
        ms=3,
    )
    axes.set(xlabel="part of the clip seen", ylabel="expected calibration error")
    axes.set_ylim(0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, None))
    return figure


def confusion(matrix: np.ndarray, class_names: Sequence[str], theme: Theme = LIGHT) -> Figure:
    """True classes by row, predicted by column; each row's shares.

    Args:
        matrix: clips [K, K].
        class_names: K names, written where there are at most `MOST_NAMES`.
        theme: colours.
    """
    count = len(class_names)
    named = count <= MOST_NAMES
    width = max(5.6, 2.4 + 0.24 * count) if named else 9.0
    figure, axes = _figure(theme, width=width, height=0.9 * width)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    colours = LinearSegmentedColormap.from_list("", [theme.background, theme.series[0]])
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    if named:
        names = [_label(name) for name in class_names]
        axes.set_xticks(range(count), names, rotation=90, fontsize=8)
        axes.set_yticks(range(count), names, fontsize=8)
    if count <= 12:
        for row, column in np.argwhere(matrix > 0):
            colour = theme.background if shares[row, column] > 0.55 else theme.text
            text = f"{matrix[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, format=PercentFormatter(1.0, 0))
    bar.ax.tick_params(colors=theme.text)
    bar.outline.set_edgecolor(theme.grid)
    return figure


def write_png(figure: Figure, path: Path, *, dpi: int = 120) -> None:
    """Writes a figure aside, then renames.

    Raises:
        OSError: the file cannot be written.
    """
    with written_aside(Path(path)) as aside, _without_glyph_warnings():
        figure.savefig(aside, format="png", dpi=dpi)


def as_svg(figure: Figure) -> bytes:
    """An SVG file; letters are drawn as shapes, the same wherever it is shown."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "rvit_jax"}), _without_glyph_warnings():
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()


@contextlib.contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """A class name in letters that the font has not is drawn as boxes; a page has its own fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _figure(theme: Theme, *, width: float = 4.6, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(color=theme.grid, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    return figure, axes


def _legend(axes: Axes, theme: Theme) -> None:
    legend = axes.legend(frameon=False, fontsize=8, loc="best")
    for text in legend.get_texts():
        text.set_color(theme.text)


def _label(name: str, most: int = 40) -> str:
    """A class name as matplotlib takes it: no formula, and not endless."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")
