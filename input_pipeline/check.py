"""Reads a data set once and lists what is wrong: python -m input_pipeline.check --config=FILE

Every clip of every split is read whole: lines of the lists that cannot be used, clips without their
folder or file, gaps in the numbers of frames, files that are no whole image or video, and clips
that stand in two splits or twice in one, under whatever id.

Exit status: 0 nothing is wrong; 1 something is, or the data cannot be read at all; 2 wrong
arguments; 128 + n after signal n.
"""

from __future__ import annotations

from input_pipeline.command_line import leave_at_once, own_flags, require

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import collections
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import jester
from input_pipeline.command_line import ArgumentError, check_output_file, parse, run, suggest
from input_pipeline.cpus import in_threads
from input_pipeline.files import write_json
from input_pipeline.source import Source, VideoInfo

FRAMES_AT_ONCE = 64  # of a film, in each thread
MOST_LINES = 20  # of one kind, on the terminal; the file has them all


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong with a data set.

    Attributes:
        kind: of the problem, for counting.
        split: where.
        message: names the file or the clip.
    """

    kind: str
    split: str
    message: str


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What reading one clip gave."""

    clip_id: str
    sha256: str  # of what was read; "" where nothing could be
    num_frames: int
    problems: tuple[tuple[str, str], ...]  # kind and message


def check(
    config: ConfigDict, splits: Sequence[str] = jester.SPLITS, *, progress: bool = False
) -> tuple[list[Problem], dict[str, dict[str, int]]]:
    """Reads the splits of the config's data set.

    Args:
        config: the whole config; `dataset.*` is read.
        splits: those that are not there are left out, train excepted.
        progress: show a bar.

    Returns:
        The problems, and per split what was read: {"clips": n, "frames": n}.

    Raises:
        FileNotFoundError: there is no data.
        ValueError: a list cannot be read at all, or a key has a value that cannot be.
    """
    problems: list[Problem] = []
    counts: dict[str, dict[str, int]] = {}
    seen: dict[str, tuple[str, str]] = {}  # content -> where it was first
    ids: dict[str, str] = {}
    for split in splits:
        if config.dataset.name == "video_folder":  # paths in the split's own folder: 1.mp4, ...
            ids.clear()
        try:
            listed, clip_ids, read = _open(config, split)
        except FileNotFoundError:
            if split == "train" or (split == splits[-1] and not counts):  # nothing at all
                raise
            print(f"{split}: not there, and left out", file=sys.stderr)
            continue
        problems += [Problem(kind, split, message) for kind, message in listed]
        counts[split] = {"clips": 0, "frames": 0}
        for reading in in_threads(
            read, len(clip_ids), progress=f"checking {split}" if progress else None
        ):
            counts[split]["clips"] += 1
            counts[split]["frames"] += reading.num_frames
            problems += [Problem(kind, split, message) for kind, message in reading.problems]
            problems += _twice(reading, split, ids, seen)
    return problems, counts


def _twice(
    reading: _Reading, split: str, ids: dict[str, str], seen: dict[str, tuple[str, str]]
) -> Iterator[Problem]:
    clip_id = reading.clip_id
    other = ids.setdefault(clip_id, split)
    if other != split:
        yield Problem("overlap", split, f"the clip {clip_id} is in {other} too")
    elif reading.sha256:
        first_split, first_id = seen.setdefault(reading.sha256, (split, clip_id))
        if (first_split, first_id) != (split, clip_id):
            yield Problem(
                "overlap",
                split,
                f"the clip {clip_id} holds the same as clip {first_id} of {first_split}",
            )


def _open(
    config: ConfigDict, split: str
) -> tuple[list[tuple[str, str]], Sequence[str], Callable[[int], _Reading]]:
    """Problems of the split's list, its clips, and how one of them is read."""
    if config.dataset.name in ("jester", "gestures"):
        data_dir = os.path.expanduser(config.dataset.data_dir)
        if config.dataset.name == "gestures" and not os.path.isdir(data_dir):
            raise FileNotFoundError(input_pipeline.how_to_draw(config))
        survey = jester.survey_split(data_dir, split)
        folders = [survey.frames_dir / clip_id for clip_id in survey.ids]
        listed = [("list", message) for message in survey.problems]
        return listed, survey.ids, lambda index: _read_folder(folders[index])
    config = config.copy_and_resolve_references()
    config.dataset.missing = "skip"  # to be listed, whatever training does
    source = input_pipeline.open_source(config, split)
    if config.dataset.name in input_pipeline.VIDEO_NAMES:
        from input_pipeline.video_files import VideoFiles

        assert isinstance(source, VideoFiles)
        listed = [("missing", f"the video of {clip_id} is missing") for clip_id in source.missing]
    else:
        what = f"{source.num_missing} clips of the CSV were left out when the set was prepared"
        listed = [("missing", f"{what}: see its report")] if source.num_missing else []
    return listed, source.ids, lambda index: _read_clip(source, index)


def _read_clip(source: Source, index: int) -> _Reading:
    """Reads and decodes every frame of a clip, wherever it lies."""
    clip_id, digest = source.ids[index], hashlib.sha256()
    start, num_frames = 0, 1
    while start < num_frames:  # some at a time: a film's frames do not fit in memory

        def choose(info: VideoInfo, start: int = start) -> np.ndarray:
            nonlocal num_frames
            num_frames = info.num_frames
            return np.arange(start, min(start + FRAMES_AT_ONCE, num_frames))

        try:
            for frame in source.read(index, choose):
                digest.update(frame.tobytes())
        except (OSError, ValueError) as error:
            return _Reading(clip_id, "", start, (("damaged", f"{clip_id}: {error}"),))
        start += FRAMES_AT_ONCE
    return _Reading(clip_id, digest.hexdigest(), num_frames, ())


def _read_folder(folder: Path) -> _Reading:
    """Reads and decodes every frame of a folder."""
    from input_pipeline.transforms import decode_image

    try:
        files = jester.frame_files(str(folder))
    except FileNotFoundError as error:
        return _Reading(folder.name, "", 0, (("no frames", str(error)),))
    problems = []
    every = (jester.frame_number(os.path.basename(file)) for file in files)
    numbers = [number for number in every if number is not None]
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    if twice:
        problems.append(("numbers", f"{folder}: two files have the number {twice[0]}"))
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    if numbers[0] > 1:
        problems.append(("numbers", f"{folder} begins with frame {numbers[0]}"))
    if missing:
        few = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        problems.append(("numbers", f"{folder} lacks {len(missing)} frames: {few}"))
    digest, sizes = hashlib.sha256(), set()
    for file in files:
        try:
            digest.update(Path(file).read_bytes())
            sizes.add(decode_image(file).shape)
        except (OSError, ValueError) as error:
            problems.append(("damaged", str(error)))
    if len(sizes) > 1:
        problems.append(("sizes", f"{folder}: its frames are of {len(sizes)} sizes"))
    return _Reading(folder.name, digest.hexdigest(), len(files), tuple(problems))


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The command's flags; `argv` tells which config keys are set."""
    values = own_flags(argv, "Config file of the data.")
    flags.DEFINE_list("splits", list(jester.SPLITS), "What to read.", flag_values=values)
    flags.DEFINE_string("output", None, "A JSON file for all that is wrong.", flag_values=values)
    return values


def _parse(argv: list[str]) -> flags.FlagValues:
    """Raises ArgumentError where an argument is wrong or missing."""
    values = define_flags(argv)
    parse(values, argv, __doc__)
    require(values, config="configs/jester.py")
    if not values.splits:
        raise ArgumentError(f"--splits is empty: say some of {','.join(jester.SPLITS)}")
    for split in values.splits:
        if split not in jester.SPLITS:
            raise ArgumentError(f"--splits: {split!r} is unknown{suggest(split, jester.SPLITS)}")
    return values


def _report(problems: list[Problem], counts: dict[str, dict[str, int]]) -> None:
    shown: collections.Counter[str] = collections.Counter()
    for problem in problems:
        shown[problem.kind] += 1
        if shown[problem.kind] <= MOST_LINES:
            print(f"{problem.split}: {problem.message}")
        elif shown[problem.kind] == MOST_LINES + 1:
            print(f"... more of the kind {problem.kind!r} (--output=FILE has them all)")
    for split, count in counts.items():
        print(f"{split}: {count['clips']} clips, {count['frames']} frames read")
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(shown.items()))
    print(f"{len(problems)} problems: {kinds}" if problems else "nothing is wrong")


def _check(argv: list[str]) -> int:
    values = _parse(argv)
    output = Path(values.output).expanduser() if values.output else None
    if output is not None:
        check_output_file(output)
    problems, counts = check(values.config, values.splits, progress=True)
    _report(problems, counts)
    if output is not None:
        listed = [dataclasses.asdict(problem) for problem in problems]
        write_json(output, {"read": counts, "problems": listed})
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    return run(_check, sys.argv if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
