"""20BN-Jester: its classes, its files, and which clip belongs to which label."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from input_pipeline import transforms
from input_pipeline.command_line import suggest
from input_pipeline.source import ChooseFrames, VideoInfo, few, rows_of

# Class index = position. This is the order of the reference and so of its checkpoint; it is NOT
# the order of `jester-v1-labels.csv`.
CLASS_NAMES = (
    "Swiping Left",
    "Swiping Right",
    "Swiping Down",
    "Swiping Up",
    "Pushing Hand Away",
    "Pulling Hand In",
    "Sliding Two Fingers Left",
    "Sliding Two Fingers Right",
    "Sliding Two Fingers Down",
    "Sliding Two Fingers Up",
    "Pushing Two Fingers Away",
    "Pulling Two Fingers In",
    "Rolling Hand Forward",
    "Rolling Hand Backward",
    "Turning Hand Clockwise",
    "Turning Hand Counterclockwise",
    "Zooming In With Full Hand",
    "Zooming Out With Full Hand",
    "Zooming In With Two Fingers",
    "Zooming Out With Two Fingers",
    "Thumb Up",
    "Thumb Down",
    "Shaking Hand",
    "Stop Sign",
    "Drumming Fingers",
    "No gesture",
    "Doing other things",
)

# Pairs that a mirror image (left for right) and a film run backwards turn into each other.
_MIRROR_PAIRS = (
    ("Swiping Left", "Swiping Right"),
    ("Sliding Two Fingers Left", "Sliding Two Fingers Right"),
    ("Turning Hand Clockwise", "Turning Hand Counterclockwise"),
)
_REVERSAL_PAIRS = (
    *_MIRROR_PAIRS,
    ("Swiping Down", "Swiping Up"),
    ("Pushing Hand Away", "Pulling Hand In"),
    ("Sliding Two Fingers Down", "Sliding Two Fingers Up"),
    ("Pushing Two Fingers Away", "Pulling Two Fingers In"),
    ("Rolling Hand Forward", "Rolling Hand Backward"),
    ("Zooming In With Full Hand", "Zooming Out With Full Hand"),
    ("Zooming In With Two Fingers", "Zooming Out With Two Fingers"),
)
# A raised thumb lowered again, a stop sign taken away and "other things" have no label backwards.
_NEVER_REVERSED = ("Thumb Up", "Thumb Down", "Stop Sign", "Doing other things")


def _label_map(pairs: tuple[tuple[str, str], ...], *, without: tuple[str, ...] = ()):
    swap = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return {name: swap.get(name, name) for name in CLASS_NAMES if name not in without}


MIRRORED = _label_map(_MIRROR_PAIRS)  # class -> class of the mirrored clip
REVERSED = _label_map(_REVERSAL_PAIRS, without=_NEVER_REVERSED)  # class -> class run backwards

SPLITS = ("train", "validation", "test")

# Places inside data_dir, in the order in which they are tried; "" is data_dir itself.
_CSV_FOLDERS = ("annotations", "20bn-jester-v1/annotations", "label", "")
FRAME_FOLDERS = ("20bn-jester-v1", "video", "")
# The full list first: where a folder holds both, the course's short one is passed over.
_CSV_NAMES = ("jester-v1-{}.csv", "jester-v1-{}-quick-testing.csv")
_FRAME_NAME = re.compile(r"(\d+)\.jpe?g", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Split:
    """The clips of one split, in the order of its CSV: a `source.Source`.

    Attributes:
        name: "train", "validation" or "test".
        frames_dir: the folder that holds one folder of frames per clip, named by its id.
        ids: one id per clip.
        labels: class index per clip, int32 [num_clips]; None where the CSV gives no labels.
        class_names: in index order.
        num_missing: 0; a clip without its folder is an error.
    """

    name: str
    frames_dir: str
    ids: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    num_missing: int = 0

    def read(self, index: int, choose: ChooseFrames) -> list[np.ndarray]:
        """Decodes frames of a clip; see `source.Source`."""
        files = self._files(index)
        decode = functools.cache(transforms.decode_image)
        return [decode(files[frame]) for frame in choose(VideoInfo(len(files))).tolist()]

    def video_info(self, index: int) -> VideoInfo:
        """How many frames clip `index` has; raises as `read` does."""
        return VideoInfo(len(self._files(index)))

    def _files(self, index: int) -> list[str]:
        return frame_files(os.path.join(self.frames_dir, self.ids[index]))

    def select(self, ids: Sequence[str]) -> Split:
        """The clips `ids` alone, in that order.

        Raises:
            ValueError: an id is not in the split, or given twice.
        """
        order = rows_of(self, ids)
        labels = self.labels
        if labels is not None:
            labels = labels[order]
        return dataclasses.replace(self, ids=tuple(ids), labels=labels)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a CSV: the clip's id, and its label where it has one."""

    line: int  # of the CSV, from 1
    clip_id: str
    label: str | None


def read_split(
    data_dir: str | Path,
    split: str,
    classes: Sequence[str] = (),
    name: str = "jester",
) -> Split:
    """Reads a split's CSV and finds the folder of every clip that it names.

    Clips are looked up by id. Deviation: the reference takes the n-th folder of a sorted list for
    id n, so that with a folder missing every label after it belongs to another video.

    Three layouts are known: `20bn-jester-v1/<id>/` with the CSVs in `annotations/` or
    `20bn-jester-v1/annotations/` (the archive's), `video/<id>/` with `label/` (the reference's),
    and everything in `data_dir` itself. Clips of known classes that are not wanted are left out; a
    class is known if it is Jester's or in the labels CSV.

    Args:
        data_dir: the folder of the data.
        split: "train", "validation" or "test". Only test may come without labels.
        classes: names in index order; () means `CLASS_NAMES`. Each class that is named must have a
            clip in train; with (), those without one are only reported.
        name: what the config calls the data; only used in messages.

    Returns:
        The split; the frames are listed later, clip by clip.

    Raises:
        ValueError: a line or a class is wrong; the message names the file and the line.
        FileNotFoundError: `data_dir`, the CSV or the folder of a clip is missing.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(_missing_data_message(data_dir, name))
    csv_file = find_csv(data_dir, split)
    known = known_classes(csv_file.parent)
    class_names = tuple(classes) or CLASS_NAMES
    check_classes(class_names, known)
    rows = read_csv(csv_file)
    labelled = check_labels(rows, csv_file, split, known)
    if labelled:
        check_coverage(rows, csv_file, split, class_names, explicit=bool(classes))
        rows = [row for row in rows if row.label in class_names]
    if not rows:
        raise ValueError(
            f"{csv_file} holds no clip of the classes wanted ({few(class_names)}): "
            "name others in dataset.classes, or leave it empty"
        )
    ids = tuple(row.clip_id for row in rows)
    index: dict[str | None, int] = {name: i for i, name in enumerate(class_names)}
    return Split(
        name=split,
        frames_dir=str(_find_frames_dir(data_dir, ids, csv_file)),
        ids=ids,
        labels=np.array([index[row.label] for row in rows], np.int32) if labelled else None,
        class_names=class_names,
    )


@dataclasses.dataclass(frozen=True)
class Survey:
    """A split's clips and everything that is wrong with its list of them.

    Attributes:
        csv_file: the list.
        frames_dir: the folder that holds most of the clips' folders.
        ids: those of the list that have a folder.
        problems: a line each.
    """

    csv_file: Path
    frames_dir: Path
    ids: tuple[str, ...]
    problems: tuple[str, ...]


def survey_split(data_dir: str | Path, split: str) -> Survey:
    """Reads a split's CSV as `read_split` does, but goes on where that stops.

    Raises:
        FileNotFoundError: `data_dir` or the CSV is missing, or no clip of it has a folder.
        ValueError: the CSV is no text or has no clip.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(_missing_data_message(data_dir, "jester"))
    csv_file = find_csv(data_dir, split)
    problems: list[str] = []
    rows = read_csv(csv_file, problems.append)
    check_labels(rows, csv_file, split, known_classes(csv_file.parent), problems.append)
    ids = [row.clip_id for row in rows]
    folders = _present_clips(data_dir)
    frames_dir = max(folders, key=lambda f: len(folders[f].intersection(ids)), default=None)
    if frames_dir is None or not folders[frames_dir].intersection(ids):
        raise FileNotFoundError(_no_clips_message(data_dir, tuple(ids), csv_file))
    present = folders[frames_dir]
    problems += [
        f"{csv_file}:{row.line}: the clip {row.clip_id} has no folder in {frames_dir}"
        for row in rows
        if row.clip_id not in present
    ]
    return Survey(csv_file, frames_dir, tuple(i for i in ids if i in present), tuple(problems))


def frame_files(clip_dir: str) -> list[str]:
    """Lists the frames of a clip: paths of the files NNNNN.jpg, by their number.

    Raises:
        FileNotFoundError: the folder is gone or holds no frame.
    """
    try:
        names = os.listdir(clip_dir)
    except OSError as error:
        raise FileNotFoundError(
            f"cannot list the frames in {clip_dir}: {error.strerror}; extract the clip again"
        ) from error
    frames = in_order(names)
    if not frames:
        raise FileNotFoundError(
            f"{clip_dir} holds no frame; expected 00001.jpg, 00002.jpg, ...: "
            "extract the clip again, or take it out of the CSV"
        )
    return [os.path.join(clip_dir, name) for name in frames]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The frames among the names of a clip's files, by their number."""
    frames = ((number, name) for name in names if (number := frame_number(name)) is not None)
    return tuple(name for _, name in sorted(frames))


def frame_number(name: str) -> int | None:
    """The number in a frame's file name (12 for 00012.jpg); None if it is no frame's."""
    match = _FRAME_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _missing_data_message(data_dir: Path, name: str) -> str:
    message = f"dataset.data_dir: there is no folder {data_dir}"
    if name != "jester":
        return message
    return (
        f"{message}; expected 20BN-Jester there: 20bn-jester-v1/<id>/00001.jpg ... with "
        "annotations/jester-v1-train.csv ..., or video/<id>/ with label/. Download its parts and "
        "labels, join and unpack the parts in that folder (cat 20bn-jester-v1-?? | tar zx), or "
        "set --config.dataset.data_dir; configs/gestures.py needs no download"
    )


def find_csv(data_dir: Path, split: str) -> Path:
    """The CSV of a split in one of the known places, or FileNotFoundError."""
    for folder in _CSV_FOLDERS:
        found = [
            path
            for name in _CSV_NAMES
            if (path := data_dir / folder / name.format(split)).is_file()
        ]
        if len(found) > 1:
            logging.warning("%s: reading %s, not %s", found[0].parent, found[0].name, found[1].name)
        if found:
            return found[0]
    names = " or ".join(name.format(split) for name in _CSV_NAMES)
    places = ", ".join(f"{folder}/" for folder in _CSV_FOLDERS if folder)
    present = [
        other
        for other in SPLITS
        if any((data_dir / f / n.format(other)).is_file() for f in _CSV_FOLDERS for n in _CSV_NAMES)
    ]
    raise FileNotFoundError(
        f"no CSV of the split {split!r} in {data_dir}: looked for {names} there and in {places}; "
        f"splits present: {', '.join(present) or 'none'}. Copy the file (it comes apart from the "
        "videos) into annotations/, or choose a split that is there"
    )


def known_classes(folder: Path) -> tuple[str, ...]:
    """Jester's classes, and those of the labels CSV in the folder of the other CSVs."""
    names = dict.fromkeys(CLASS_NAMES)
    for pattern in _CSV_NAMES:
        labels_csv = folder / pattern.format("labels")
        if labels_csv.is_file():
            names.update(dict.fromkeys(line.strip() for _, line in _lines(labels_csv)))
    return tuple(names)


def check_classes(class_names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises ValueError for a class that is unknown or named twice."""
    for name in class_names:
        if name not in known:
            raise ValueError(
                f"dataset.classes: {name!r} is no class of this data{suggest(name, known)}"
            )
    if len(set(class_names)) < len(class_names):
        twice = [name for name in class_names if class_names.count(name) > 1]
        raise ValueError(f"dataset.classes names {twice[0]!r} twice: name each class once")


def _lines(file: Path) -> Iterable[tuple[int, str]]:
    """Yields (line number from 1, text) of the lines that are not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error.reason}): save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line


def _refuse(message: str) -> None:
    raise ValueError(message)


def read_csv(csv_file: Path, complain: Callable[[str], None] = _refuse) -> list[Row]:
    """The rows; `complain` hears of lines that are wrong, which are left out if it returns."""
    rows: dict[str, Row] = {}
    for number, line in _lines(csv_file):
        fields = [field.strip() for field in line.split(";")]
        if len(fields) == 1 and re.search(r"[,\t]", line):
            complain(
                f"{csv_file}:{number}: expected 'id;label', got {line.strip()!r}: "
                "separate the fields by a semicolon"
            )
            continue
        if len(fields) > 2 or not fields[0]:
            complain(f"{csv_file}:{number}: expected 'id;label', got {line.strip()!r}")
            continue
        row = Row(number, fields[0], fields[1] if len(fields) == 2 and fields[1] else None)
        if row.clip_id in rows:
            complain(
                f"{csv_file}:{number}: the id {row.clip_id!r} stands in line "
                f"{rows[row.clip_id].line} already: remove one of the two lines"
            )
            continue
        rows[row.clip_id] = row
    if not rows:
        raise ValueError(f"{csv_file} is empty; expected lines 'id;label'")
    return list(rows.values())


def check_labels(
    rows: list[Row],
    csv_file: Path,
    split: str,
    known: tuple[str, ...],
    complain: Callable[[str], None] = _refuse,
) -> bool:
    """Returns whether the rows have labels, all of them known; test may have none at all."""
    unlabelled = [row for row in rows if row.label is None]
    if split == "test" and len(unlabelled) == len(rows):
        return False
    if unlabelled:
        row = unlabelled[0]
        complain(
            f"{csv_file}:{row.line}: the clip {row.clip_id!r} has no label; expected 'id;label' "
            f"({len(unlabelled)} of {len(rows)} lines have none)"
        )
    known_set = set(known)
    for row in rows:
        if row.label is not None and row.label not in known_set:
            complain(
                f"{csv_file}:{row.line}: unknown label {row.label!r}{suggest(row.label, known)}"
            )
    return True


def check_coverage(
    rows: list[Row],
    csv_file: Path,
    split: str,
    class_names: tuple[str, ...],
    *,
    explicit: bool,
) -> None:
    """Says which classes have no clip; raises ValueError if they were asked for, in train."""
    present = {row.label for row in rows}
    absent = [name for name in class_names if name not in present]
    if split == "train" and absent and explicit:
        raise ValueError(
            f"{csv_file} has no clip of {few(absent)}: take the class out of dataset.classes, "
            "or add clips of it"
        )
    if absent:
        logging.warning("%s has no clip of %s", csv_file, few(absent))
    left_out = sum(row.label not in class_names for row in rows)
    if left_out:
        logging.warning(
            "%s: %d of %d clips are of other classes than those asked for, and left out",
            *(csv_file, left_out, len(rows)),
        )


def _find_frames_dir(data_dir: Path, ids: tuple[str, ...], csv_file: Path) -> Path:
    """Returns the first known place that holds a clip; it must hold them all."""
    for frames_dir, present in _present_clips(data_dir).items():
        missing = [clip_id for clip_id in ids if clip_id not in present]
        if not missing:
            return frames_dir
        if len(missing) < len(ids):
            raise FileNotFoundError(
                f"{len(missing)} of the {len(ids)} clips in {csv_file} have no folder in "
                f"{frames_dir}: {few(missing)}; extract every part of the archive, or take "
                "their lines out of the CSV"
            )
    raise FileNotFoundError(_no_clips_message(data_dir, ids, csv_file))


def _present_clips(data_dir: Path) -> dict[Path, set[str]]:
    """Known place -> the folders in it."""
    found = {}
    for frames_dir in (data_dir / folder for folder in FRAME_FOLDERS):
        if frames_dir.is_dir():
            with os.scandir(frames_dir) as entries:  # once, not a look-up per clip: 148,092
                found[frames_dir] = {entry.name for entry in entries if entry.is_dir()}
    return found


def _no_clips_message(data_dir: Path, ids: tuple[str, ...], csv_file: Path) -> str:
    places = ", ".join(f"{folder}/<id>/" for folder in FRAME_FOLDERS if folder)
    return (
        f"none of the {len(ids)} clips in {csv_file} ({few(ids)}) has a folder in {data_dir}: "
        f"looked for {places} and <id>/; extract the archive there, or set dataset.data_dir"
    )
