"""How well a model answers in an endless stream: each clip after minutes of nothing.

    python scripts/streaming_accuracy.py --config=configs/gestures.py:all
        --checkpoint=results/gestures_all [--idle_frames=3000] [--clips=1024] [--split=test]

Clips of one class ("No gesture") follow one another for `--idle_frames` frames of video; then a
clip of another class comes, and the answer after its last frame counts. The table sets several
ways of streaming beside the same clips alone, which is what evaluation measures: the windowed
default of `rvit_jax.predict`, two states by turns, forgetting, and the raw recurrence.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.command_line import check_output_file, leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

import input_pipeline
import rvit_jax
from configs import base
from input_pipeline import jester
from input_pipeline.files import write_json
from rvit_jax.command import ArgumentError, parse, run, start
from rvit_jax.config import check_config
from rvit_jax.streaming import Streams

IDLE_STREAMS = 8  # their ends differ by a part of the window; clips are spread over them
CLIPS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips in memory: video uint8 [n, T, H, W, 3], num_frames [n], label [n]."""

    video: np.ndarray
    num_frames: np.ndarray
    label: np.ndarray

    def take(self, rows: np.ndarray) -> "Clips":
        """Some of them."""
        return Clips(self.video[rows], self.num_frames[rows], self.label[rows])


def read_clips(config: ConfigDict, split: str) -> Clips:
    """A whole split, decoded.

    Raises:
        ValueError: it has no labels.
    """
    data = input_pipeline.get_dataset(config, split)
    if not data.has_labels:
        raise ValueError(f"the {split} split has no labels: choose another --split")
    parts: list[tuple[np.ndarray, ...]] = []
    for batch in tqdm(data, total=data.steps_per_epoch, desc=split, unit="batch"):
        mask = batch["mask"]
        parts.append((batch["video"][mask], batch["num_frames"][mask], batch["label"][mask]))
    data.close()
    return Clips(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def idle_frames(idle: Clips, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Frames [H, W, 3] of clips in random order, without end."""
    while True:
        for row in rng.permutation(len(idle.label)):
            yield from idle.video[row, : idle.num_frames[row]]


def after_idling(
    streams: Streams, idle: Clips, clips: Clips, steps: Sequence[int], *, seed: int, what: str
) -> np.ndarray:
    """Probabilities [n, K] after each clip's last frame, when the stream idled before it.

    Args:
        streams: `len(steps)` of them, at their beginning.
        idle: what comes first.
        clips: what comes then, one for each answer.
        steps: frames of idling that each stream reads.
        seed: of the idle clips' order.
        what: for the progress bar.
    """
    sources = [idle_frames(idle, np.random.default_rng([seed, i])) for i in range(len(steps))]
    blank = np.zeros_like(idle.video[0, 0])
    interval = 0.5 if sys.stderr.isatty() else 30.0
    for t in tqdm(range(max(steps)), desc=what, unit="frame", mininterval=interval):
        active = np.array([t < limit for limit in steps])
        frames = [next(s) if a else blank for s, a in zip(sources, active, strict=True)]
        streams.step(np.stack(frames), active)
    return read_clips_after(streams, clips)


def read_clips_after(streams: Streams, clips: Clips) -> np.ndarray:
    """Probabilities [n, K] after each clip's last frame; the streams go on with all in turn."""
    rows = np.arange(len(clips.label))
    parts = []
    for chunk in np.array_split(rows, math.ceil(len(rows) / CLIPS_AT_ONCE)):
        continued, some = streams.select(chunk % len(streams.num_frames)), clips.take(chunk)
        answers = np.zeros((len(chunk), 1), np.float32)
        for t in range(some.video.shape[1]):
            active = t < some.num_frames
            probabilities = continued.step(some.video[:, t], active)
            answers = np.where(active[:, None], probabilities, answers)
        parts.append(answers)
    return np.concatenate(parts)


def measure(
    config: ConfigDict,
    checkpoint: str,
    split: str,
    *,
    idle_class: str,
    num_idle_frames: int,
    num_clips: int,
) -> dict[str, Any]:
    """Top-1 of every way of streaming.

    Raises:
        OSError: the data or the checkpoint is missing.
        ValueError: the model has no class of that name, or the split no such clip.
    """
    loaded = rvit_jax.load(checkpoint)
    if idle_class not in loaded.class_names:
        raise ValueError(
            f"the model has no class {idle_class!r}: choose --idle_class from "
            f"{', '.join(loaded.class_names)}"
        )
    if list(config.dataset.classes) and tuple(config.dataset.classes) != loaded.class_names:
        raise ValueError(f"{checkpoint} has other classes than the config")
    config.model.update(loaded.config.model)
    everything = read_clips(config, split)
    index = loaded.class_names.index(idle_class)
    idle = everything.take(np.flatnonzero(everything.label == index))
    rng = np.random.default_rng(config.seed)
    others = rng.permutation(np.flatnonzero(everything.label != index))
    clips = everything.take(others[:num_clips])
    if not len(idle.label) or not len(clips.label):
        raise ValueError(f"the {split} split has no clip of {idle_class!r}, or none of another")
    window, stride = config.dataset.num_frames, config.dataset.frame_stride
    steps = [
        math.ceil(num_idle_frames / stride) + round(i * window / IDLE_STREAMS)
        for i in range(IDLE_STREAMS)
    ]
    ways = {
        f"window {window} (default)": {"window": window},
        f"window {window}, 8 states": {"window": window, "num_states": 8},
        f"window {2 * window}, 2 states": {"window": 2 * window, "num_states": 2},
        "decay 0.9": {"decay": 0.9},
        "decay 0.8": {"decay": 0.8},
        "raw recurrence": {},
    }
    answers = {"each clip alone": read_clips_after(Streams(loaded.model), clips)}
    for name, settings in ways.items():
        streams = Streams(loaded.model, IDLE_STREAMS, **settings)
        answers[name] = after_idling(streams, idle, clips, steps, seed=config.seed, what=name)
    right = {name: answer.argmax(axis=-1) == clips.label for name, answer in answers.items()}
    reference = right["each clip alone"].astype(float)
    return {
        "num_clips": len(clips.label),
        "idle_frames": num_idle_frames,
        "ways": [
            {
                "way": name,
                "top1": float(values.mean()),
                "difference": float((values - reference).mean()),
                "standard_error": float((values - reference).std() / math.sqrt(len(reference))),
            }
            for name, values in right.items()
        ],
    }


def table(summary: dict[str, Any]) -> str:
    """The summary to read; percent and percentage points."""
    lines = [
        f"top-1 of {summary['num_clips']} clips, each after {summary['idle_frames']} idle frames",
        f"{'':24} {'top-1':>7} {'difference':>11} {'s.e.':>6}",
    ]
    lines += [
        f"{row['way']:24} {100 * row['top1']:>7.2f} {100 * row['difference']:>+11.2f} "
        f"{100 * row['standard_error']:>6.2f}"
        for row in summary["ways"]
    ]
    return "\n".join(lines)


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(argv, "Config file of the data, and a variant.")
    for name, default, what in (
        ("checkpoint", None, "Workdir, checkpoint folder or converted model."),
        ("idle_class", "No gesture", "Class of what comes before each clip."),
        ("output", None, "JSON file to write the table to."),
    ):
        flags.DEFINE_string(name, default, what, flag_values=values)
    flags.DEFINE_enum(
        "split", "test", jester.SPLITS, "Split that the clips come from.", flag_values=values
    )
    flags.DEFINE_integer(
        "idle_frames", 3000, "Frames of video before each clip.", 0, flag_values=values
    )
    flags.DEFINE_integer("clips", 1024, "Clips to answer.", 1, flag_values=values)
    return values


def parse_flags(argv: list[str]) -> flags.FlagValues:
    """The flags' values; raises ArgumentError where one is unknown, missing or does not fit."""
    values = define_flags(argv)
    parse(values, argv, __doc__)
    require(values, config="configs/gestures.py:all", checkpoint="results/gestures_all")
    return values


def _work(argv: list[str]) -> None:
    values = parse_flags(argv)
    try:
        check_config(values.config, base.get_config())
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    output = Path(values.output).expanduser() if values.output else None
    if output is not None:
        check_output_file(output)
    summary = measure(
        values.config,
        values.checkpoint,
        values.split,
        idle_class=values.idle_class,
        num_idle_frames=values.idle_frames,
        num_clips=values.clips,
    )
    print(table(summary))
    if output is not None:
        write_json(output, summary)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_work, sys.argv if argv is None else argv)


if __name__ == "__main__":
    start(main)
