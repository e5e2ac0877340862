"""Data sets of video files: which clips there are, their labels, and reading chosen frames of one.

`read_split` opens a split of any of the layouts in `NAMES`; `VideoFiles` is what it gives.
Annotation files are checked whole and every video is looked for before the first is read.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from input_pipeline import VIDEO_NAMES
from input_pipeline.command_line import suggest
from input_pipeline.source import ChooseFrames, VideoInfo, few, printable, rows_of
from input_pipeline.video_frames import VideoIndex, read_frames, read_index

NAMES = VIDEO_NAMES
SPLITS = ("train", "validation", "test")
MISSING = ("fail", "skip")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")
# Up to the first ending of a video that a blank follows: the label may have several words.
_PATH_AND_LABEL = rf"(.*?(?:{'|'.join(map(re.escape, VIDEO_SUFFIXES))}))\s+(\S.*)"

_SPLIT_NAMES = {  # as folders and files call them
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "validate"),
    "test": ("test", "testing"),
}
_MOST_CLASSES = 1_000_000

Span = tuple[int, float, float]  # class index, start and end in seconds


# --- The source -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VideoFiles:
    """The clips of one split, one video file each; a `source.Source`.

    Threads may share it and worker processes get it pickled. What was learned of a file (how many
    frames, where its key frames lie) stays in memory after its first reading, in each process.

    Attributes:
        name: "train", "validation" or "test".
        ids: one id per clip.
        labels: class index per clip, int32 [num_clips]; of several labels per clip, float32
            [num_clips, K] of 0 and 1; None where the data gives none.
        class_names: in index order.
        paths: the file of each clip.
        missing: ids of clips that were left out because their file is not there.
        spans: what happens when, per clip; None where the data does not say. Of all the spans that
            the annotations give, those of `class_names`.
    """

    name: str
    ids: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    missing: tuple[str, ...] = ()
    spans: tuple[tuple[Span, ...], ...] | None = None
    _known: dict[str, VideoIndex] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    @property
    def num_missing(self) -> int:
        """How many clips were left out because their file is not there."""
        return len(self.missing)

    def read(self, index: int, choose: ChooseFrames) -> list[np.ndarray]:
        """Decodes frames of a clip; see `source.Source` and `video_frames.read_frames`."""
        path = self.paths[index]
        try:
            if path not in self._known:
                self._known[path] = read_index(path)
            return read_frames(path, self._known[path], choose)
        except StopIteration as error:  # a loader would take it for the end of the data
            raise RuntimeError(f"reading {path} stopped halfway") from error

    def video_info(self, index: int) -> VideoInfo:
        """How many frames clip `index` has, and their rate; raises as `read` does."""
        path = self.paths[index]
        if path not in self._known:
            self._known[path] = read_index(path)
        return self._known[path].info

    def select(self, ids: Sequence[str]) -> VideoFiles:
        """The clips `ids` alone, in that order.

        Raises:
            ValueError: an id is not in the split, or given twice.
        """
        order = rows_of(self, ids)
        return dataclasses.replace(
            self,
            ids=tuple(ids),
            labels=None if self.labels is None else self.labels[order],
            paths=tuple(self.paths[row] for row in order),
            spans=None if self.spans is None else tuple(self.spans[row] for row in order),
        )


# --- Annotations ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """A clip of the annotations.

    `labels` are class names (of one label: a tuple of one); None where there is none. The file is
    looked for as `places`: (folder, file name, perhaps without its ending).
    """

    where: str  # "FILE:LINE", for messages
    clip_id: str
    labels: tuple[str, ...] | None
    places: tuple[tuple[str, str], ...]
    spans: tuple[tuple[str, float, float], ...] = ()  # of class names

    @property
    def given(self) -> tuple[str, ...]:
        """Its labels, in a split that has them."""
        assert self.labels is not None
        return self.labels


@dataclasses.dataclass(frozen=True)
class _Listed:
    """What the annotations of a split say."""

    file: str
    rows: list[_Row]
    classes: tuple[str, ...]  # all that the data knows, in index order
    multi_label: bool = False
    has_spans: bool = False


def read_split(
    name: str,
    data_dir: str | Path,
    split: str,
    classes: Sequence[str] = (),
    labels: str = "",
    missing: str = "fail",
) -> VideoFiles:
    """Opens one split of a data set of video files.

    - "video_folder": `<split>/<class>/<video>`; a test split may hold videos without classes.
    - "video_list": `<split>.csv` (`path,label` or `path label`) or `<split>.jsonl` (`{"path":
      ..., "label": ...}`; a label is a name, an index or a list of them), paths below `data_dir`;
      class names in index order may stand in `classes.txt`.
    - "ssv2": Something-Something V2; `labels/{train,validation,test}.json`, `labels/labels.json`,
      `20bn-something-something-v2/<id>.webm`.
    - "kinetics400": `label,youtube_id,time_start,time_end,split` in `<split>.csv`, videos
      `<split>/[<label>/]<youtube_id>_<start>_<end>.mp4`.
    - "charades": `Charades_v1_{train,test}.csv`, `Charades_v1_classes.txt`,
      `Charades_v1_480/<id>.mp4`; several labels per clip. Its test split is "validation" here.

    Args:
        name: one of `NAMES`.
        data_dir: the folder of the data.
        split: "train", "validation" or "test". Only test may come without labels.
        classes: class names in index order; () means all. Clips of the data's other classes are
            left out (of several labels per clip: the other labels are). Each class named must have
            a clip in train.
        labels: the annotation file inside `data_dir`, "{split}" standing for the split's name, or
            the folder of the annotation files; "" means the usual places.
        missing: "fail": every video must be there | "skip": leave out those that are not, and
            count them in `VideoFiles.missing`.

    Returns:
        The split; no video is opened yet.

    Raises:
        ValueError: an argument, a line or a class is wrong; the message names the file and line.
        FileNotFoundError: `data_dir`, an annotation file or a video is missing.
    """
    for key, value, choices in (
        ("dataset.name", name, NAMES),
        ("split", split, SPLITS),
        ("dataset.missing", missing, MISSING),
    ):
        if value not in choices:
            raise ValueError(f"{key} is {value!r}; choose one of: {', '.join(choices)}")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"dataset.data_dir: there is no folder {root}; expected {_EXPECTED[name]} there: put "
            "the data there, or set --config.dataset.data_dir"
        )
    listing = _Listing()
    listed = _READERS[name](root, split, _Annotations(root, labels, split), listing)
    if not listed.rows:
        raise ValueError(f"{listed.file} is empty; expected {_EXPECTED[name]}")
    _check_ids(listed.rows)
    return _assemble(listed, split, tuple(classes), listing, skip=missing == "skip")


_EXPECTED = {
    "video_folder": "train/<class>/<video>, validation/<class>/<video>",
    "video_list": "train.csv or train.jsonl, validation.csv or .jsonl, and the videos they name",
    "ssv2": "labels/{labels,train,validation,test}.json, 20bn-something-something-v2/<id>.webm",
    "kinetics400": "{train,validation,test}.csv, <split>/[<label>/]<youtube_id>_<6>_<6>.mp4",
    "charades": "Charades_v1_{train,test}.csv, Charades_v1_classes.txt, Charades_v1_480/<id>.mp4",
}


def _check_ids(rows: list[_Row]) -> None:
    first: dict[Any, _Row] = {}
    for row in rows:
        for key in (row.clip_id, row.places):  # one file under two names is one clip
            if first.setdefault(key, row) is not row:
                raise ValueError(
                    f"{row.where}: the clip {row.clip_id!r} stands in {first[key].where} already: "
                    "remove one of the two"
                )


def _assemble(
    listed: _Listed, split: str, wanted: tuple[str, ...], listing: _Listing, *, skip: bool
) -> VideoFiles:
    """From rows to a source: the classes, then the files, then the matrix or vector of labels."""
    class_names = wanted or listed.classes
    _check_classes(class_names, listed)
    labelled = _check_labels(listed, split)
    rows = listed.rows
    if labelled:
        _check_coverage(listed, split, class_names, explicit=bool(wanted))
        if not listed.multi_label:
            rows = [row for row in rows if row.given[0] in set(class_names)]
    if not rows:
        raise ValueError(
            f"{listed.file} holds no clip of the classes wanted ({few(class_names)}): name others "
            "in dataset.classes, or leave it empty"
        )
    rows, paths, missing = _find_videos(rows, listed.file, listing, skip=skip)
    index = {name: place for place, name in enumerate(class_names)}
    spans = None
    if listed.has_spans:
        spans = tuple(
            tuple((index[name], start, end) for name, start, end in row.spans if name in index)
            for row in rows
        )
    return VideoFiles(
        name=split,
        ids=tuple(row.clip_id for row in rows),
        labels=_label_array(rows, index, listed.multi_label) if labelled else None,
        class_names=class_names,
        paths=tuple(paths),
        missing=tuple(missing),
        spans=spans,
    )


def _label_array(rows: list[_Row], index: Mapping[str, int], multi_label: bool) -> np.ndarray:
    if not multi_label:
        return np.array([index[row.given[0]] for row in rows], np.int32)
    matrix = np.zeros((len(rows), len(index)), np.float32)
    for place, row in enumerate(rows):
        matrix[place, [index[name] for name in row.given if name in index]] = 1.0
    return matrix


def _check_classes(class_names: tuple[str, ...], listed: _Listed) -> None:
    known = set(listed.classes)
    for name in class_names:
        if name not in known:
            raise ValueError(
                f"dataset.classes: {name!r} is no class of {listed.file}"
                f"{suggest(name, listed.classes)}"
            )
    twice = [name for name in class_names if class_names.count(name) > 1]
    if twice:
        raise ValueError(f"dataset.classes names {twice[0]!r} twice: name each class once")


def _check_labels(listed: _Listed, split: str) -> bool:
    """Returns whether the rows have labels, all of them known; test may have none at all."""
    unlabelled = [row for row in listed.rows if row.labels is None]
    if split == "test" and len(unlabelled) == len(listed.rows):
        return False
    if unlabelled:
        raise ValueError(
            f"{unlabelled[0].where}: the clip {unlabelled[0].clip_id!r} has no label "
            f"({len(unlabelled)} of {len(listed.rows)} clips have none): add it"
        )
    known = set(listed.classes)
    for row in listed.rows:
        for label in row.given:
            if label not in known:
                raise ValueError(
                    f"{row.where}: unknown label {label!r}{suggest(label, listed.classes)}"
                )
    return True


def _check_coverage(
    listed: _Listed, split: str, class_names: tuple[str, ...], *, explicit: bool
) -> None:
    present = {label for row in listed.rows for label in row.given}
    absent = [name for name in class_names if name not in present]
    if split == "train" and absent and explicit:
        raise ValueError(
            f"{listed.file} has no clip of {few(absent)}: take the class out of dataset.classes, "
            "or add clips of it"
        )
    if absent:
        logging.warning("%s has no clip of %s", listed.file, few(absent))
    wanted = set(class_names)
    left_out = sum(not wanted & set(row.given) for row in listed.rows)
    if left_out and not listed.multi_label:
        logging.warning(
            "%s: %d of %d clips are of other classes than those asked for, and left out",
            *(listed.file, left_out, len(listed.rows)),
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) of the lines that are not blank."""
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            yield number, line


class _Listing:
    """The names of the files in folders, each folder read once: 240,000 videos, a few look-ups."""

    def __init__(self):
        self._names: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> set[str]:
        """The files in a folder; none where there is no such folder."""
        return set(self._read(folder).values())

    def find(self, places: Sequence[tuple[str, str]]) -> str | None:
        """The first of the places that holds a file, with any of the endings of videos."""
        for folder, name in places:
            file = self._read(folder).get(name)
            if file is not None:
                return os.path.join(folder, file)
        return None

    def _read(self, folder: str) -> dict[str, str]:
        """Name of a file, and of a video without its ending -> name of the file."""
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    files = [entry.name for entry in entries if entry.is_file()]
            except (FileNotFoundError, NotADirectoryError):
                files = []
            except OSError as error:
                raise ValueError(f"cannot list the videos in {folder}: {error.strerror}") from error
            stems: dict[str, str] = {}
            for file in sorted(files):  # of "a.avi" and "a.mp4", the latter; whatever the disk says
                stem, ending = os.path.splitext(file)
                if ending in VIDEO_SUFFIXES:
                    stems[stem] = file
            self._names[folder] = stems | {file: file for file in files}
        return self._names[folder]


def _find_videos(
    rows: list[_Row], file: str, listing: _Listing, *, skip: bool
) -> tuple[list[_Row], list[str], list[str]]:
    """Returns the rows whose videos are there, those files, and the ids of the others."""
    found = [listing.find(row.places) for row in rows]
    missing = [row for row, path in zip(rows, found, strict=True) if path is None]
    if missing and (not skip or len(missing) == len(rows)):
        folders = dict.fromkeys(folder for folder, _ in missing[0].places)
        remedy = (
            "set dataset.data_dir, or put the videos there"
            if skip or len(missing) == len(rows)
            else "put them there, or set dataset.missing=skip to leave them out"
        )
        raise FileNotFoundError(
            f"{len(missing)} of the {len(rows)} videos in {file} are missing: "
            f"{few([row.clip_id for row in missing])}; looked for {missing[0].places[0][1]} in "
            f"{', '.join(folders)}: {remedy}"
        )
    if missing:
        ids = few([row.clip_id for row in missing])
        logging.warning(
            "%s: %d of its %d videos are missing and left out: %s",
            file,
            len(missing),
            len(rows),
            ids,
        )
    there = [(row, path) for row, path in zip(rows, found, strict=True) if path is not None]
    return [row for row, _ in there], [path for _, path in there], [r.clip_id for r in missing]


@dataclasses.dataclass(frozen=True)
class _Annotations:
    """Where the annotation files lie: what `dataset.labels` says, or the usual places."""

    root: Path
    labels: str
    split: str

    def find(self, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path:
        """The split's file, the first of these names in the first of these folders.

        Raises:
            FileNotFoundError: there is none.
            ValueError: `labels` names one file for all the splits.
        """
        if self.labels:
            path = self.root / self.labels.replace("{split}", self.split)
            if path.is_file():
                if "{split}" not in self.labels:
                    raise ValueError(
                        f"dataset.labels={self.labels!r} is one file for every split, and training "
                        "would see what is evaluated: write {split} for the split's name, as "
                        "'labels/{split}.csv', or name the folder of the files"
                    )
                return path
        return self._find(names, folders, f"no annotations of the split {self.split!r}")

    def beside(self, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path | None:
        """A file that all splits share, such as the list of classes; None if there is none."""
        for folder in self._folders(folders):
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        return None

    def require(self, names: Sequence[str], folders: Sequence[str] = ("",)) -> Path:
        """`beside`, but it must be there."""
        return self._find(names, folders, "no list of the classes")

    def _find(self, names: Sequence[str], folders: Sequence[str], what: str) -> Path:
        found = self.beside(names, folders)
        if found is None:
            places = ", ".join(str(folder) for folder in self._folders(folders))
            raise FileNotFoundError(
                f"{what}: looked for {' or '.join(names)} in {places}; copy it there, or say in "
                "dataset.labels where it lies inside dataset.data_dir"
            )
        return found

    def _folders(self, folders: Sequence[str]) -> list[Path]:
        if not self.labels:
            return [self.root / folder for folder in folders]
        path = self.root / self.labels.replace("{split}", self.split)
        return [path if path.is_dir() else path.parent]


def _named(pattern: str, split: str) -> list[str]:
    return [pattern.format(name) for name in _SPLIT_NAMES[split]]


# --- Layouts --------------------------------------------------------------------------------------


def _read_folder(root: Path, split: str, annotations: _Annotations, listing: _Listing) -> _Listed:
    if annotations.labels:
        raise ValueError("dataset.labels is for lists of videos; video_folder has none: leave it")
    folder = _split_folder(root, split)
    if folder is None:
        raise FileNotFoundError(
            f"{root} has no folder of the split {split!r}: expected "
            f"{' or '.join(_SPLIT_NAMES[split])} there; found: "
            f"{few(sorted(entry.name for entry in root.iterdir())) or 'nothing'}"
        )
    training = _split_folder(root, "train")
    classes = _class_folders(training or folder)
    if training is None:
        logging.warning("%s has no training split: its classes are those of %s", root, folder)
    rows = []
    found = _class_folders(folder)
    for name in found:
        rows += _videos_of(folder / name, f"{name}/", (printable(name),), listing)
    if not found and split == "test":
        rows = _videos_of(folder, "", None, listing)
    return _Listed(str(folder), rows, tuple(map(printable, classes)))


def _split_folder(root: Path, split: str) -> Path | None:
    there = [root / name for name in _SPLIT_NAMES[split] if (root / name).is_dir()]
    if len(there) > 1:
        raise ValueError(
            f"{there[0]} and {there[1]} are both folders of the split {split!r}: keep one"
        )
    return there[0] if there else None


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _videos_of(
    folder: Path, prefix: str, labels: tuple[str, ...] | None, listing: _Listing
) -> list[_Row]:
    names = sorted(name for name in listing.names(str(folder)) if not name.startswith("."))
    videos = [name for name in names if name.lower().endswith(VIDEO_SUFFIXES)]
    if len(videos) < len(names):
        others = [name for name in names if not name.lower().endswith(VIDEO_SUFFIXES)]
        logging.warning("%s: no videos by their names, and left out: %s", folder, few(others))
    return [
        _Row(str(folder / name), printable(prefix + name), labels, ((str(folder), name),))
        for name in videos
    ]


def _read_list(root: Path, split: str, annotations: _Annotations, listing: _Listing) -> _Listed:
    del listing
    folders = ("", "annotations", "labels")
    file = annotations.find(_list_names(split), folders)
    rows, multi_label = _list_rows(file, root)
    training_rows, names_file = rows, annotations.beside(("classes.txt",), folders)
    if split != "train":
        # What the classes are, and whether a clip may have several, is the same for all splits.
        try:
            training = dataclasses.replace(annotations, split="train")
            training_rows, multi_label = _list_rows(
                training.find(_list_names("train"), folders), root
            )
        except FileNotFoundError:
            logging.warning("%s: no train list there; its classes are its own", file)
    several = next((row for row in rows if row.labels and len(row.labels) > 1), None)
    if several and not multi_label:
        raise ValueError(f"{several.where}: several labels, but in train each clip has one")
    labels = {label for row in training_rows for label in row.labels or ()}
    numbered = bool(labels) and all(label.isdecimal() for label in labels)
    if names_file is not None:
        classes = [line.strip() for _, line in _lines(names_file)]
        _check_twice(classes, names_file)
        in_order = classes == [str(number) for number in range(len(classes))]
        if numbered and not in_order and any(name.isdecimal() for name in classes):
            raise ValueError(
                f"{names_file}: class names that are numbers, and labels that are numbers: "
                "whether a label is a name or an index cannot be told; give the classes words"
            )
    elif numbered:
        classes = [str(number) for number in range(_num_classes(training_rows))]
    else:
        classes = sorted(labels)
    if numbered:
        rows = [_numbered(row, classes) for row in rows]
    return _Listed(str(file), rows, tuple(classes), multi_label)


def _list_names(split: str) -> list[str]:
    endings = (".csv", ".txt", ".jsonl", ".json")
    return [name + ending for name in _SPLIT_NAMES[split] for ending in endings]


def _num_classes(rows: list[_Row]) -> int:
    highest = 0
    for row in rows:
        for label in row.labels or ():
            highest = max(highest, int(label))
            if highest >= _MOST_CLASSES:
                raise ValueError(f"{row.where}: {label} can be no class index: it counts from 0")
    return highest + 1


def _check_twice(classes: list[str], file: Path) -> None:
    twice = [name for name in classes if classes.count(name) > 1]
    if twice:
        raise ValueError(f"{file} names the class {twice[0]!r} twice: name each class once")


def _numbered(row: _Row, classes: list[str]) -> _Row:
    """A row with names in place of class indices."""
    for label in row.labels or ():
        if not label.isdecimal():
            raise ValueError(f"{row.where}: in train labels are indices, and {label!r} is none")
        if int(label) >= len(classes):
            raise ValueError(
                f"{row.where}: there is no class {label}: the {len(classes)} classes are numbered "
                "from 0"
            )
    if row.labels is None:
        return row
    return dataclasses.replace(row, labels=tuple(classes[int(label)] for label in row.labels))


def _list_rows(file: Path, root: Path) -> tuple[list[_Row], bool]:
    """The rows of a list, and whether a clip may have several labels."""
    lines = list(_lines(file))
    if lines and lines[0][1].lstrip().startswith("{"):
        return _json_rows(lines, file, root)
    comma = bool(lines) and "," in lines[0][1]
    rows = []
    for place, (number, line) in enumerate(lines):
        where = f"{file}:{number}"
        fields = _fields(line.strip(), comma, where)
        if place == 0 and _is_header(fields):
            continue
        rows.append(_list_row(where, fields[0], (fields[1],) if len(fields) > 1 else None, root))
    return rows, False


def _is_header(fields: list[str]) -> bool:
    """Whether the first line names the columns: its path has no ending of a video."""
    words = {"path", "video", "file", "filename", "name", "id", "label", "class", "category"}
    return not fields[0].lower().endswith(VIDEO_SUFFIXES) and bool(
        words & {field.lower() for field in fields}
    )


def _fields(line: str, comma: bool, where: str) -> list[str]:
    if comma:
        try:
            fields = [field.strip() for field in next(csv.reader([line], strict=True), [])]
        except csv.Error as error:
            raise ValueError(f"{where}: {error}; expected 'path,label': {line!r}") from error
    elif "\t" in line:
        fields = [field.strip() for field in line.split("\t")]
    elif line.lower().endswith(VIDEO_SUFFIXES):
        fields = [line]
    elif after_path := re.match(_PATH_AND_LABEL, line, re.IGNORECASE):
        fields = list(after_path.groups())
    else:
        fields = line.split()  # a path without the ending of a video: a label of one word
    while len(fields) > 1 and not fields[-1]:
        fields.pop()  # "path,": no label
    if len(fields) > 2 or not fields or not fields[0]:
        raise ValueError(
            f"{where}: expected 'path,label', got {line!r}: put a name with a comma in quotes"
        )
    return fields


def _json_rows(lines: list[tuple[int, str]], file: Path, root: Path) -> tuple[list[_Row], bool]:
    rows, multi_label = [], False
    for number, line in lines:
        where = f"{file}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: no JSON ({error.msg}): {line.strip()[:60]!r}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(
                f'{where}: expected {{"path": "...", "label": ...}}, got {line.strip()[:60]!r}'
            )
        label = entry.get("label")
        multi_label |= isinstance(label, list)
        several = label if isinstance(label, list) else [label]
        for one in several:
            index = isinstance(one, int) and not isinstance(one, bool) and one >= 0
            if not (index or (isinstance(one, str) and one) or label is None):
                raise ValueError(
                    f"{where}: the label {one!r} is no name, index from 0, or list of them"
                )
        labels = None if label is None else tuple(dict.fromkeys(map(str, several)))
        rows.append(_list_row(where, entry["path"], labels, root))
    return rows, multi_label


def _list_row(where: str, path: str, labels: tuple[str, ...] | None, root: Path) -> _Row:
    file = os.path.normpath(root / path)
    if not os.path.isabs(path) and os.path.normpath(path).startswith(".."):
        raise ValueError(
            f"{where}: {path!r} leads out of dataset.data_dir: paths are below it, or absolute"
        )
    return _Row(where, path, labels, (os.path.split(file),))


def _read_ssv2(root: Path, split: str, annotations: _Annotations, listing: _Listing) -> _Listed:
    del listing
    folders = ("labels", "annotations", "")
    names_file = annotations.require(("labels.json", "something-something-v2-labels.json"), folders)
    classes = _ssv2_classes(names_file)
    file = annotations.find(
        (*_named("{}.json", split), *_named("something-something-v2-{}.json", split)), folders
    )
    text, entries = _json(file)
    if not isinstance(entries, list):
        raise ValueError(f'{file}: expected a list of {{"id": ..., "template": ...}}')
    videos = [str(root / name) for name in ("20bn-something-something-v2", "videos", "")]
    rows = []
    for number, entry in enumerate(entries):
        where = f"{file}: entry {number}"
        clip_id = str(entry.get("id", "")) if isinstance(entry, dict) else ""
        if not re.fullmatch(r"[\w-]+", clip_id):
            raise ValueError(f"{where}: no id of digits: {json.dumps(entry)[:80]}")
        template = entry.get("template")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{where}: its template is no text: {template!r}")
        # "[something]" in the splits, "something" in the list of classes.
        label = None if template is None else template.replace("[", "").replace("]", "")
        rows.append(
            _Row(
                where,
                clip_id,
                None if label is None else (label,),
                tuple((folder, clip_id) for folder in videos),
            )
        )
    return _Listed(str(file), _with_lines(rows, text, file, classes), classes)


def _with_lines(rows: list[_Row], text: str, file: Path, classes: tuple[str, ...]) -> list[_Row]:
    """Gives rows the number of the line where their id stands, if any will be complained of."""
    known, ids = set(classes), [row.clip_id for row in rows]
    if len(set(ids)) == len(ids) and all(row.labels and row.labels[0] in known for row in rows):
        return rows
    places = list(re.finditer(r'"id"\s*:\s*"?[\w-]+', text))
    if len(places) != len(rows):
        return rows
    line, last, numbered = 1, 0, []
    for row, match in zip(rows, places, strict=True):
        line += text.count("\n", last, match.start())
        last = match.start()
        numbered.append(dataclasses.replace(row, where=f"{file}:{line}"))
    return numbered


def _json(file: Path) -> tuple[str, Any]:
    text = _text(file)
    try:
        return text, json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: no JSON: {error.msg}; get it again") from error
    except RecursionError as error:
        raise ValueError(f"{file}: nested too deep to be annotations; get it again") from error


def _ssv2_classes(file: Path) -> tuple[str, ...]:
    _, entries = _json(file)
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f'{file}: expected {{"template": "index", ...}}')
    by_index: dict[int, str] = {}
    for template, index in entries.items():
        if not str(index).isdecimal():
            raise ValueError(f"{file}: the class {template!r} has no index from 0: {index!r}")
        if int(index) in by_index:
            raise ValueError(
                f"{file}: the classes {by_index[int(index)]!r} and {template!r} both have the "
                f"index {index}"
            )
        by_index[int(index)] = template.replace("[", "").replace("]", "")
    if set(by_index) != set(range(len(by_index))):
        gap = min(set(range(len(by_index))) - set(by_index))
        raise ValueError(f"{file}: no class has the index {gap}; {len(by_index)} classes are there")
    return tuple(by_index[index] for index in range(len(by_index)))


def _table(file: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV with a header: ("FILE:LINE", column -> text)."""
    reader = csv.reader(io.StringIO(_text(file)), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [field.strip() for field in fields]
                absent = [column for column in needed if column not in header]
                if absent:
                    raise ValueError(
                        f"{file}:{reader.line_num}: no column {few(absent)} in the header; "
                        f"expected {', '.join(needed)}: {','.join(fields)[:80]!r}"
                    )
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{file}:{reader.line_num}: {len(fields)} fields, the header has {len(header)}:"
                    f" {','.join(fields)[:80]!r}; put a field with a comma in quotes"
                )
            values = [field.strip() for field in fields]
            yield f"{file}:{reader.line_num}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: {error}; expected a CSV") from error


def _read_kinetics(root: Path, split: str, annotations: _Annotations, listing: _Listing) -> _Listed:
    del listing
    folders = ("", "annotations", "labels")
    file = annotations.find(_kinetics_names(split), folders)
    rows = list(_kinetics_rows(file, root, split))
    training_rows = rows
    if split != "train":
        try:
            found = dataclasses.replace(annotations, split="train").find(
                _kinetics_names("train"), folders
            )
            training_rows = list(_kinetics_rows(found, root, "train"))
        except FileNotFoundError:
            logging.warning("%s: no train list there; its classes are its own", file)
    classes = sorted({label for row in training_rows for label in row.labels or ()})
    return _Listed(str(file), rows, tuple(classes))


def _kinetics_names(split: str) -> list[str]:
    patterns = ("{}.csv", "kinetics400_{}.csv", "kinetics_400_{}.csv", "kinetics_{}.csv")
    return [name for pattern in patterns for name in _named(pattern, split)]


def _kinetics_rows(file: Path, root: Path, split: str) -> Iterator[_Row]:
    folders: dict[str | None, list[str]] = {}
    for where, row in _table(file, ("youtube_id", "time_start", "time_end")):
        if row.get("split", "") not in ("", *_SPLIT_NAMES[split]):
            raise ValueError(
                f"{where}: a clip of the split {row['split']!r} in the list of {split!r}: take the "
                "right file, or take the line out"
            )
        name, label = row["youtube_id"], row.get("label") or None
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{where}: {name!r} is no YouTube id")
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{where}: time_start and time_end are seconds, got "
                f"{row['time_start']!r} and {row['time_end']!r}"
            ) from error
        clip_id = f"{name}_{start:06d}_{end:06d}"
        if label not in folders:
            if label is not None and (os.path.basename(label) != label or label in (".", "..")):
                raise ValueError(f"{where}: {label!r} cannot be the name of a folder")
            folders[label] = _kinetics_folders(root, split, label)
        places = tuple((folder, clip_id) for folder in folders[label])
        yield _Row(where, clip_id, None if label is None else (label,), places)


def _kinetics_folders(root: Path, split: str, label: str | None) -> list[str]:
    """Where a clip may lie: in its class's folder (blanks or underscores), or in the split's."""
    there = [str(root / name) for name in _SPLIT_NAMES[split]]
    names = [] if label is None else dict.fromkeys((label, label.replace(" ", "_")))
    return [os.path.join(folder, name) for folder in there for name in names] + there


def _read_charades(root: Path, split: str, annotations: _Annotations, listing: _Listing) -> _Listed:
    del listing
    if split == "test":
        raise ValueError(
            "Charades has two splits with labels, train and test; its test split is 'validation' "
            "here: use --split=validation, and leave test_after_training False"
        )
    folders = ("", "Charades", "annotations", "labels")
    own = "train" if split == "train" else "test"
    names_file = annotations.require(("Charades_v1_classes.txt",), folders)
    codes = _charades_classes(names_file)
    file = annotations.find((f"Charades_v1_{own}.csv",), folders)
    videos = [str(root / n) for n in ("Charades_v1_480", "Charades_v1", "videos", "")]
    rows, turned = [], 0
    for where, entry in _table(file, ("id", "actions", "length")):
        if not re.fullmatch(r"[\w-]+", entry["id"]):
            raise ValueError(f"{where}: {entry['id']!r} is no id of a video")
        length = _seconds(entry["length"], where) if entry["length"] else float("inf")
        spans = []
        for action in filter(None, map(str.strip, entry["actions"].split(";"))):
            code, start, end = _action(action, where, codes)
            turned += end < start
            spans.append((codes[code], min(start, end), max(start, end)))
        present = dict.fromkeys(name for name, start, _ in spans if start <= length)
        places = tuple((folder, entry["id"]) for folder in videos)
        rows.append(_Row(where, entry["id"], tuple(present), places, tuple(spans)))
    if turned:
        logging.warning("%s: %d actions end before they start; read the other way", file, turned)
    return _Listed(str(file), rows, tuple(codes.values()), multi_label=True, has_spans=True)


def _charades_classes(file: Path) -> dict[str, str]:
    """Code ("c092") -> name, in index order."""
    codes: dict[str, str] = {}
    for number, line in _lines(file):
        match = re.fullmatch(r"(c\d{3})\s+(\S.*)", line.strip())
        if match is None or int(match[1][1:]) != len(codes):
            raise ValueError(
                f"{file}:{number}: expected 'c{len(codes):03d} NAME', got {line.strip()!r}"
            )
        codes[match[1]] = match[2]
    if not codes:
        raise ValueError(f"{file} is empty; expected lines 'c000 NAME'")
    _check_twice(list(codes.values()), file)
    return codes


def _action(action: str, where: str, codes: Mapping[str, str]) -> tuple[str, float, float]:
    fields = action.split()
    if len(fields) != 3:
        raise ValueError(f"{where}: expected 'CLASS START END', got {action!r}")
    if fields[0] not in codes:
        raise ValueError(f"{where}: unknown class {fields[0]!r}{suggest(fields[0], tuple(codes))}")
    return fields[0], _seconds(fields[1], where), _seconds(fields[2], where)


def _seconds(text: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < 1e6:
        raise ValueError(f"{where}: {text!r} is no time in seconds")
    return seconds


_READERS: dict[str, Callable[[Path, str, _Annotations, _Listing], _Listed]] = {
    "video_folder": _read_folder,
    "video_list": _read_list,
    "ssv2": _read_ssv2,
    "kinetics400": _read_kinetics,
    "charades": _read_charades,
}
