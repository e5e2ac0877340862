"""Statistics, tables and plots of `scripts/benchmark.py`: numbers in, numbers and text out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OURS = "rvit_jax"  # what the names of our contenders begin with

Row = dict[str, Any]  # one measurement in its section of benchmark.json


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles of one figure per round."""
    first, median, third = np.percentile(seconds, [25, 50, 75]).tolist()
    return {
        "median_s": median,
        "quartile_1_s": first,
        "quartile_3_s": third,
        "rounds": len(seconds),
    }


def speedup(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Their seconds over ours, round by round of the same run; above 1 ours is faster."""
    first, median, third = np.percentile(np.divide(theirs, ours), [25, 50, 75]).tolist()
    return {
        "of_medians": float(np.median(theirs) / np.median(ours)),
        "paired_median": median,
        "paired_quartile_1": first,
        "paired_quartile_3": third,
    }


def speedups(rounds: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each of our variants against each other contender: ours -> theirs -> `speedup`."""
    ours = [name for name in rounds if name.startswith(OURS)]
    theirs = [name for name in rounds if not name.startswith(OURS)]
    return {a: {b: speedup(rounds[b], rounds[a]) for b in theirs} for a in ours}


def medians(samples: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """One figure per round: the median of its calls."""
    return {name: [float(np.median(turn)) for turn in turns] for name, turns in samples.items()}


def fitted_exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of `seconds ~ values ** p`: least squares on logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def table(report: dict[str, Any]) -> str:
    """The report to read, in Markdown."""
    environment, settings = report["environment"], report["settings"]
    device = environment["gpu"] or environment["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    parts = [
        f"# Benchmark, {environment['date']}",
        f"{device}; {environment['cores']} cores, PyTorch on {environment['torch_threads']} "
        f"threads; {versions}; float32 products: {settings['matmul_precision']}",
    ]
    for name, rows in report["sections"].items():
        if rows:
            parts += [f"## {name}", *TABLES[name](rows)]
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up on a terminal too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join((first, *rest))} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(line(row) for row in (header, rule, *rows))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.1f}"


def _time(figures: Row) -> list[str]:
    """Median and quartiles in ms."""
    return [
        _ms(figures["median_s"]),
        f"{_ms(figures['quartile_1_s'])}-{_ms(figures['quartile_3_s'])}",
    ]


def _speedup_header(row: Row) -> list[str]:
    return [f"{name}, times (paired)" for name in row["speedups"]]


def _speedup_cells(row: Row, name: str) -> list[str]:
    """Speedup of each of our variants over `name`, of medians and paired."""
    cells = []
    for against in row["speedups"].values():
        figures = against.get(name)
        cells.append(
            f"{figures['of_medians']:.2f} ({figures['paired_median']:.2f})" if figures else ""
        )
    return cells


def _contenders(rows: Sequence[Row], title: str, columns: dict[str, Callable]) -> list[str]:
    """A table per row: each contender's time, our speedups over it, further columns."""
    parts = []
    for row in rows:
        header = [title.format(**row), "ms", "quartiles", *_speedup_header(row), *columns]
        body = [
            [
                name,
                *_time(figures),
                *_speedup_cells(row, name),
                *(cell(figures) for cell in columns.values()),
            ]
            for name, figures in row["contenders"].items()
        ]
        parts.append(_markdown(header, body))
        parts += [f"Left out: {name}: {reason}" for name, reason in row["failed"].items()]
    return parts


def _inference(rows: Sequence[Row]) -> list[str]:
    return _contenders(
        rows,
        "B = {batch_size}, T = {num_frames}, {dtype}",
        {
            "clips/s": lambda f: f"{f['clips_per_s']:.1f}",
            "of matrix peak": lambda f: f"{f['share_of_matrix_peak']:.0%}",
            "error": lambda f: f"{f['relative_error']:.0e}",
            "first call s": lambda f: f"{f['first_call_s']:.1f}",
        },
    )


def _training(rows: Sequence[Row]) -> list[str]:
    return _contenders(
        rows,
        "step, B = {batch_size}, T = {num_frames}, {dtype}",
        {
            "first loss": lambda f: f"{f['first_loss']:.3f}",
            "first call s": lambda f: f"{f['first_call_s']:.1f}",
        },
    )


def _precision(rows: Sequence[Row]) -> list[str]:
    parts = []
    for row in rows:
        first = "training step, B = {batch_size}, T = {num_frames}".format(**row)
        header = (first, "ms", "quartiles", "O0's time over it (paired)")
        header += ("parameters MB", "optimizer MB", "XLA temp. MB")
        body = [
            [
                level,
                *_time(figures),
                "{of_medians:.2f} ({paired_median:.2f})".format(**figures["speedup"]),
                *(
                    _megabytes(figures[f"{name}_bytes"])
                    for name in ("parameter", "optimizer", "temporary")
                ),
            ]
            for level, figures in row["levels"].items()
        ]
        parts.append(_markdown(header, body))
    return parts


def _streaming(rows: Sequence[Row]) -> list[str]:
    parts = _contenders(
        rows,
        "frame, B = 1, {dtype}",
        {
            "p50 ms": lambda f: _ms(f["p50_s"]),
            "p95 ms": lambda f: _ms(f["p95_s"]),
            "error": lambda f: f"{f['relative_error']:.0e}",
            "first call s": lambda f: f"{f['first_call_s']:.1f}",
        },
    )
    for row in rows:
        flops = {
            name: value for name, value in row["flops"].items() if name != "xla_over_reference"
        }
        counts = ", ".join(
            f"{name} {'unknown' if value is None else f'{value / 1e6:.1f}'}"
            for name, value in flops.items()
        )
        parts.append(f"MFLOP a frame ({row['dtype']}): {counts}")
    return parts


def _scaling(rows: Sequence[Row]) -> list[str]:
    parts = []
    for row in rows:
        header = (f"{row['what']}, {row['over']}", "ms", "quartiles", "compile s", "XLA temp. MB")
        header += ("arguments MB",)
        body = [
            [
                str(point[row["over"]]),
                *_time(point),
                f"{point['compile_s']:.1f}",
                _megabytes(point["temporary_bytes"]),
                _megabytes(point["argument_bytes"]),
            ]
            for point in row["points"]
        ]
        exponents = f"{row['exponent']:.3f} (of the operations: {row['flops_exponent']:.3f})"
        parts += [_markdown(header, body), f"fitted exponent {exponents}"]
    return parts


def _memory(rows: Sequence[Row]) -> list[str]:
    header = ("B = {batch_size}, T = {num_frames}".format(**rows[0]), "peak RSS MB")
    header += ("above start MB", "device peak MB")
    body = []
    for row in rows:
        device, peak = row["device_peak_bytes"], row["peak_rss_bytes"]
        body.append(
            [
                f"{row['what']}, {row['implementation']}",
                f"{peak / 1e6:.0f}",
                f"{(peak - row['rss_before_bytes']) / 1e6:.0f}",
                "" if device is None else f"{device / 1e6:.0f}",
            ]
        )
    return [_markdown(header, body)]


def _loader(rows: Sequence[Row]) -> list[str]:
    return _contenders(
        rows,
        "batch of {batch_size}, {num_workers} workers",
        {
            "clips/s": lambda f: f"{f['clips_per_s']:.1f}",
            "pixels differ, mean (max)": lambda f: (
                f"{f['mean_pixel_difference']:.2f} ({f['max_pixel_difference']:.0f})"
            ),
        },
    )


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "inference": _inference,
    "training": _training,
    "precision": _precision,
    "streaming": _streaming,
    "scaling": _scaling,
    "memory": _memory,
    "loader": _loader,
}


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws `speedups.png` and `scaling.png`, as far as there are results.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    drawn = []
    sections = report["sections"]
    bars = _bars(sections)
    if bars:
        figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
        axes = figure.subplots()
        labels, values, errors = zip(*bars[::-1], strict=True)
        axes.barh(labels, values, xerr=np.transpose(errors), color="tab:blue", ecolor="gray")
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel("their time over ours")
        drawn.append(folder / "speedups.png")
        figure.savefig(drawn[-1], dpi=120)
    if sections.get("scaling"):
        rows = sections["scaling"]
        figure = Figure(figsize=(3.4 * len(rows), 3.2), layout="constrained")
        for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
            values = [point[row["over"]] for point in row["points"]]
            axes.loglog(values, [1e3 * point["median_s"] for point in row["points"]], "o-")
            axes.set_xticks(values, [str(value) for value in values])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_xlabel(row["over"])
            axes.set_ylabel(f"{row['what']}, ms")
            axes.set_title(f"exponent {row['exponent']:.2f}", fontsize=10)
        drawn.append(folder / "scaling.png")
        figure.savefig(drawn[-1], dpi=120)
    return drawn


def _bars(sections: dict[str, list[Row]]) -> list[tuple[str, float, tuple[float, float]]]:
    """Label, paired median and its distances to the quartiles, of every speedup of `OURS`."""
    bars = []
    for section in ("inference", "training", "streaming"):
        for row in sections.get(section, ()):
            for ours, against in row["speedups"].items():
                for name, figures in against.items():
                    variant = ours.removeprefix(OURS)
                    label = f"{section}, B = {row['batch_size']}, {row['dtype']}{variant}: {name}"
                    median = figures["paired_median"]
                    below = median - figures["paired_quartile_1"]
                    bars.append((label, median, (below, figures["paired_quartile_3"] - median)))
    return bars
