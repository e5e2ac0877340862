"""20BN-Jester as a TFDS data set: from folders, or from the download's parts, to ArrayRecord.

The parts `20bn-jester-v1-00`, `-01`, ... are one .tar.gz cut in pieces. They are read as one
stream, once, from the first byte to the last; nothing is unpacked to disk, and memory holds one
clip at a time. JPEG files are stored as they are. Importing this module imports TFDS (a second);
it stands alone because TFDS wants a builder's class in an importable file of this name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from tqdm import tqdm

from input_pipeline import jester
from input_pipeline.jester_parts import (
    LABEL_FOLDERS,
    PART_STEM,
    Findings,
    PartsSource,
    StoredClip,
    find_parts,
)
from input_pipeline.source import few

FORMAT = 1  # of what `metadata.json` holds; another number is refused
REPORT_NAME = "preparation_report.json"
MISSING_LABEL = -1

_SHARD_BYTES = 256 << 20
_SIZE_SAMPLE = 100  # clip folders that are measured to estimate all
_FREE_MARGIN = 1.05  # shards need the bytes of the frames, and a little


# ---- What is asked for: the CSV files ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which clips of which split are wanted.

    Attributes:
        rows: per split its rows in the order of its CSV: those of the classes wanted, at most
            `limit`.
        labelled: per split whether its CSV gives labels.
        csv_ids: the ids of all CSV files, wanted or not.
        class_names: the names that labels index: Jester's 27, then others of the labels CSV.
        settings: what was asked for, as JSON can hold it; the same for the same result.
    """

    rows: dict[str, tuple[jester.Row, ...]]
    labelled: dict[str, bool]
    csv_ids: frozenset[str]
    class_names: tuple[str, ...]
    settings: dict[str, Any]

    def places(self) -> dict[str, list[tuple[str, int]]]:
        """Where each wanted clip goes: id -> [(split, label)]; two splits may share a clip."""
        index: dict[str | None, int] = {name: i for i, name in enumerate(self.class_names)}
        places: dict[str, list[tuple[str, int]]] = {}
        for split, rows in self.rows.items():
            for row in rows:
                label = index[row.label] if self.labelled[split] else MISSING_LABEL
                places.setdefault(row.clip_id, []).append((split, label))
        return places


def read_plan(
    labels_dir: str | Path, classes: Sequence[str] = (), limit: int | None = None
) -> Plan:
    """Reads the CSV files of all splits that have one.

    Args:
        labels_dir: the folder that holds them, in one of the places that `jester.read_split` knows.
        classes: only clips of these classes; () means all. A split without labels keeps them all.
        limit: at most so many clips a split, the first of its CSV; None means all.

    Raises:
        ValueError: a line, a class or `limit` is wrong.
        FileNotFoundError: there is no CSV at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it counts clips a split, from 1")
    labels_dir = Path(labels_dir)
    csv_files = {}
    for split in jester.SPLITS:
        try:
            csv_files[split] = jester.find_csv(labels_dir, split)
        except FileNotFoundError:
            logging.info("no CSV of the split %s in %s", split, labels_dir)
    if not csv_files:
        try:
            jester.find_csv(labels_dir, jester.SPLITS[0])  # raises, naming the places
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; or say with --labels where they are") from error
    known = dict.fromkeys(jester.CLASS_NAMES)
    for csv_file in csv_files.values():
        known.update(dict.fromkeys(jester.known_classes(csv_file.parent)))
    class_names = tuple(known)
    jester.check_classes(tuple(classes), class_names)
    rows, labelled, digests = {}, {}, {}
    csv_ids: set[str] = set()
    for split, csv_file in csv_files.items():
        every = jester.read_csv(csv_file)
        csv_ids.update(row.clip_id for row in every)
        digests[split] = hashlib.sha256(csv_file.read_bytes()).hexdigest()
        labelled[split] = jester.check_labels(every, csv_file, split, class_names)
        if labelled[split] and classes:
            jester.check_coverage(every, csv_file, split, tuple(classes), explicit=True)
            every = [row for row in every if row.label in classes]
        if not every:
            raise ValueError(f"{csv_file} holds no clip of {few(classes)}: name others")
        rows[split] = tuple(every[:limit])
    return Plan(
        rows,
        labelled,
        frozenset(csv_ids),
        class_names,
        {
            "csv_sha256": digests,
            "classes": sorted(classes),
            "limit": limit,
            "class_names": list(class_names),
        },
    )


# ---- Where clips come from ---------------------------------------------------------------------


class ClipSource(Protocol):
    """Folders or parts: what `prepare` reads.

    Attributes:
        unit: what progress counts: "B" or "clip".
        description: which data this is, as JSON can hold it; the same for the same data.
    """

    unit: str
    description: dict[str, Any]

    def total(self, wanted: Collection[str]) -> int:
        """How much progress the whole reading makes, in `unit`."""
        ...

    def num_bytes(self, wanted: Collection[str]) -> int:
        """About how many bytes the wanted clips have."""
        ...

    def clips(
        self, wanted: Collection[str], findings: Findings, progress: Callable[[int], Any]
    ) -> Iterator[StoredClip]:
        """Yields each clip once, with its frames if it is wanted; tells `findings` the rest."""
        ...


class FolderSource:
    """Extracted clips: a folder of frames for each, in one of the three known layouts."""

    unit = "clip"

    def __init__(self, source: Path, plan: Plan):
        """Finds the folder that holds the clips.

        Raises:
            FileNotFoundError: no known place holds any clip of the CSV files.
        """
        for folder in jester.FRAME_FOLDERS:
            self._dir = source / folder
            if not self._dir.is_dir():
                continue
            with os.scandir(self._dir) as entries:
                self._present = {entry.name for entry in entries if entry.is_dir()}
            if self._present & plan.csv_ids:
                break
        else:
            raise FileNotFoundError(
                f"{source} holds neither clips nor parts of the archive: looked for "
                f"{PART_STEM}00 ..., 20bn-jester-v1/<id>/, video/<id>/ and <id>/ with ids of the "
                "CSV files; say with --source where the download is"
            )
        self._present -= {*LABEL_FOLDERS, *jester.FRAME_FOLDERS}
        self.description = {"kind": "folders", "path": str(self._dir.resolve())}

    def total(self, wanted: Collection[str]) -> int:
        """The number of wanted clips that are there."""
        return len(self._present.intersection(wanted))

    def num_bytes(self, wanted: Collection[str]) -> int:
        """Estimated from some of the folders, evenly spread."""
        here = sorted(self._present.intersection(wanted))
        sample = here[:: max(1, len(here) // _SIZE_SAMPLE)]
        measured = 0
        for clip_id in sample:
            with os.scandir(self._dir / clip_id) as entries:
                measured += sum(entry.stat().st_size for entry in entries)
        return measured * len(here) // max(1, len(sample))

    def clips(
        self, wanted: Collection[str], findings: Findings, progress: Callable[[int], Any]
    ) -> Iterator[StoredClip]:
        """Yields the wanted clips in the order of `wanted`, that of the CSV files.

        Raises:
            ValueError: a frame cannot be read.
        """
        findings.unread.extend(sorted(self._present.difference(wanted)))
        for clip_id in wanted:
            if clip_id not in self._present:
                continue
            clip_dir = self._dir / clip_id
            names = os.listdir(clip_dir)
            for name in names:
                if jester.frame_number(name) is None:
                    findings.add_other_file(f"{clip_id}/{name}")
            frames = jester.in_order(names)
            progress(1)
            if not frames:
                findings.empty.append(clip_id)
                continue
            data = tuple(_read_frame(clip_dir / name) for name in frames)
            yield StoredClip(clip_id, frames, data)


def _read_frame(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the frame {path}: {error.strerror}") from error


# ---- What is written: shards, what they hold, the report ---------------------------------------


class _Shards:
    """Writes the records of one split; the files get their names once their number is known."""

    def __init__(self, template: Any):
        self._template = template
        self._files: list[Path] = []
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._in_shard = 0
        self.lengths: list[int] = []
        self.num_bytes = 0

    def write(self, record: bytes) -> int:
        """Appends a record and returns its number in the split."""
        if self._writer is None:
            file = Path(self._template.data_dir) / f"{self._template.split}.{len(self._files)}.part"
            self._files.append(file)
            self.lengths.append(0)
            self._in_shard = 0
            # Uncompressed: JPEG bytes do not shrink. One record a group: random access.
            options = "group_size:1,uncompressed,max_parallelism:1"
            self._writer = array_record_module.ArrayRecordWriter(str(file), options)
        number = sum(self.lengths)
        self._writer.write(record)
        if not self._writer.ok():
            self._close()  # raises, saying why
        self.lengths[-1] += 1
        self._in_shard += len(record)
        self.num_bytes += len(record)
        if self._in_shard >= _SHARD_BYTES:
            self._close()
        return number

    def finish(self) -> None:
        """Closes the last shard, puts all on the disk and names them."""
        self._close()
        for index, file in enumerate(self._files):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            file.rename(
                self._template.sharded_filepath(shard_index=index, num_shards=len(self._files))
            )

    def _close(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {self._files[-1]}: {error}") from error


class _Ledger:
    """What was written where, and what the report says of it."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self.records: dict[str, dict[str, int]] = {split: {} for split in plan.rows}
        self._num_frames: dict[str, list[int]] = {split: [] for split in plan.rows}
        self._gaps: list[str] = []
        self._not_jpeg: list[str] = []
        self._extra: list[str] = []
        self._findings = Findings()

    @property
    def findings(self) -> Findings:
        return self._findings

    def add(self, clip: StoredClip) -> None:
        """Notes a clip, wanted or not."""
        if clip.clip_id not in self._plan.csv_ids:
            self._extra.append(clip.clip_id)
        if not clip.frames:
            return
        numbers = [int(name.partition(".")[0]) for name in clip.names]
        if numbers != list(range(1, len(numbers) + 1)):
            self._gaps.append(clip.clip_id)
        if not all(frame.startswith(b"\xff\xd8") for frame in clip.frames):
            self._not_jpeg.append(clip.clip_id)

    def add_record(self, split: str, clip: StoredClip, record: int) -> None:
        """Notes where a clip was written."""
        self.records[split][clip.clip_id] = record
        self._num_frames[split].append(len(clip.frames))

    def metadata(self) -> dict[str, Any]:
        """What reading needs: per split the clips in the order of the CSV, and their records."""
        names = enumerate(self._plan.class_names)
        index: dict[str | None, int] = {name: i for i, name in names}
        splits = {}
        for split, rows in self._plan.rows.items():
            here = [row for row in rows if row.clip_id in self.records[split]]
            labelled = self._plan.labelled[split]
            splits[split] = {
                "ids": [row.clip_id for row in here],
                "labels": [index[row.label] for row in here] if labelled else None,
                "records": [self.records[split][row.clip_id] for row in here],
                "num_left_out": len(rows) - len(here),
            }
        return {
            "format": FORMAT,
            "class_names": list(self._plan.class_names),
            "classes": self._plan.settings["classes"],
            "splits": splits,
        }

    def report(self) -> dict[str, Any]:
        """See `prepare`."""
        empty = set(self._findings.empty)
        seen_extra = {*self._extra, *(set(self._findings.unread) - self._plan.csv_ids)}
        every = [row.clip_id for rows in self._plan.rows.values() for row in rows]
        there = {*seen_extra, *self._findings.empty, *every}
        return {
            "splits": {split: self._split_report(split, empty) for split in self._plan.rows},
            "extra_ids": _sorted_ids(seen_extra | (empty - self._plan.csv_ids)),
            "empty_ids": _sorted_ids(empty),
            "odd_ids": _sorted_ids({i for i in there if not re.fullmatch(r"[0-9]+", i)}),
            "ids_in_several_splits": _sorted_ids({i for i, n in _counts(every).items() if n > 1}),
            "ids_with_gaps_in_frame_numbers": _sorted_ids(set(self._gaps)),
            "ids_with_frames_that_are_no_jpeg": _sorted_ids(set(self._not_jpeg)),
            "num_other_files": self._findings.num_other_files,
            "other_files": self._findings.other_files,
        }

    def _split_report(self, split: str, empty: set[str]) -> dict[str, Any]:
        rows, records = self._plan.rows[split], self.records[split]
        frames = self._num_frames[split]
        labels = [row.label for row in rows if row.clip_id in records and row.label is not None]
        labelled = self._plan.labelled[split]
        return {
            "num_clips": len(records),
            "clips_per_class": _counts(labels) if labelled else None,
            "missing_ids": [
                row.clip_id
                for row in rows
                if row.clip_id not in records and row.clip_id not in empty
            ],
            "frames_per_clip": {
                "min": min(frames, default=0),
                "median": statistics.median(frames) if frames else 0,
                "max": max(frames, default=0),
            },
        }


def _counts(items: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _sorted_ids(ids: Collection[str]) -> list[str]:
    """Numbers by their value, then all else."""
    return sorted(ids, key=lambda i: (not i.isdecimal(), int(i) if i.isdecimal() else 0, i))


# ---- The builder -------------------------------------------------------------------------------


class Jester(tfds.core.dataset_builder.FileReaderBuilder):
    """20BN-Jester in ArrayRecord shards, one split per CSV.

    A record holds `id`, `label` (index into the metadata's `class_names`; -1 without) and
    `frames`: the JPEG files' bytes, in the order of their numbers. Records lie in the order in
    which they were read; the metadata holds the CSV's order.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "JPEG bytes as they are, ids and CSV order"}  # noqa: RUF012

    def __init__(self, *, preparation: tuple[Plan, ClipSource] | None = None, **kwargs: Any):
        """With `preparation`, `download_and_prepare` can write; without, the set is only read."""
        self._preparation = preparation
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        frame = tfds.features.Tensor(shape=(), dtype=np.object_)
        return tfds.core.DatasetInfo(
            builder=self,
            description="20BN-Jester: short videos of hand gestures, as JPEG frames.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "label": np.int64,
                    "frames": tfds.features.Sequence(frame),
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _log_download_bytes(self) -> None:
        """Nothing: TFDS would speak of a download of unknown size, and there is none."""

    def _log_download_done(self) -> None:
        """Nothing, as before."""

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Writes all splits in one pass over the source."""
        del dl_manager, download_config  # nothing is downloaded
        if self._preparation is None:
            raise ValueError(
                "20BN-Jester is not downloaded by itself: prepare it with "
                "python scripts/prepare_jester.py --source=DIR --data_dir=DIR"
            )
        plan, source = self._preparation
        ledger = _Ledger(plan)
        shards = {split: _Shards(self._get_filename_template(split)) for split in plan.rows}
        self._write_clips(plan, source, ledger, shards)
        for split, records in ledger.records.items():
            if not records:
                raise ValueError(
                    f"the data holds none of the {len(plan.rows[split])} clips of the {split} CSV "
                    f"({few([row.clip_id for row in plan.rows[split]])}): does the CSV "
                    "belong to it?"
                )
            shards[split].finish()
        self.info.set_splits(
            tfds.core.splits.SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=shards[split].lengths,
                        num_bytes=shards[split].num_bytes,
                        filename_template=self._get_filename_template(split),
                    )
                    for split in plan.rows
                ]
            )
        )
        prepared_with = {**plan.settings, "source": source.description}
        self.info.metadata.update(ledger.metadata(), prepared_with=prepared_with)
        report = json.dumps({**ledger.report(), "prepared_with": prepared_with}, indent=1)
        (Path(self.data_dir) / REPORT_NAME).write_text(report + "\n", encoding="utf-8")

    def _write_clips(
        self, plan: Plan, source: ClipSource, ledger: _Ledger, shards: dict[str, _Shards]
    ) -> None:
        places = plan.places()
        features = self.info.features
        with tqdm(
            desc="preparing 20BN-Jester",
            total=source.total(places),
            unit=source.unit,
            unit_scale=source.unit == "B",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        ) as bar:
            for clip in source.clips(places, ledger.findings, bar.update):
                ledger.add(clip)
                for split, label in places.get(clip.clip_id, ()):
                    example = {"id": clip.clip_id, "label": label, "frames": clip.frames}
                    record = features.serialize_example(features.encode_example(example))
                    ledger.add_record(split, clip, shards[split].write(record))


def dataset_folder(data_dir: str | Path) -> Path:
    """Where TFDS keeps the data set inside its `data_dir`."""
    return Path(data_dir) / Jester.name / str(Jester.VERSION)


# ---- Preparing ---------------------------------------------------------------------------------


def prepare(
    source: str | Path,
    data_dir: str | Path,
    *,
    labels: str | Path = "",
    classes: Sequence[str] = (),
    limit: int | None = None,
) -> dict[str, Any]:
    """Writes 20BN-Jester as a TFDS data set into `data_dir`, or finds it finished there.

    All splits are written into a folder of another name, which is renamed when everything is done:
    what was interrupted is never taken for finished, and is cleared away by the next call.

    Args:
        source: the folder with the parts of the archive or, where there are none, the clips.
        data_dir: where TFDS keeps its data sets; this one's folder is `jester/1.0.0`.
        labels: the folder of the CSV files; "" means `source`.
        classes: only clips of these classes; () means all.
        limit: at most so many clips a split, the first of its CSV; None means all.

    Returns:
        The report, which is also `preparation_report.json` beside the shards: `splits` (per split
        `num_clips`, `clips_per_class` (None without labels), `missing_ids` (in the CSV, not in the
        data), `frames_per_clip`), `extra_ids` (in the data, in no CSV), `empty_ids`, `odd_ids` (no
        numbers), ...; `already_prepared`: whether nothing had to be done.

    Raises:
        ValueError: CSV files, parts or clips are wrong, or `data_dir` holds a set prepared in
            another way, or another process is writing there.
        FileNotFoundError: a folder or all CSV files are missing.
        OSError: the disk is full, or not large enough to begin with.
    """
    source, data_dir = Path(source).expanduser(), Path(data_dir).expanduser()
    for option, folder in (("source", source), ("labels", Path(labels).expanduser())):
        if not folder.is_dir():
            raise FileNotFoundError(f"--{option}: there is no folder {folder}")
    plan = read_plan(Path(labels).expanduser() if labels else source, classes, limit)
    parts = find_parts(source)
    clips = PartsSource(parts, len(plan.csv_ids)) if parts else FolderSource(source, plan)
    with _only_one(data_dir):
        folder = dataset_folder(data_dir)
        if folder.exists():
            return {**_finished(folder, plan, clips), "already_prepared": True}
        for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
            logging.warning("removing what an interrupted run left: %s", leftover)
            shutil.rmtree(leftover)
        _check_space(data_dir, int(clips.num_bytes(plan.places()) * _FREE_MARGIN))
        Jester(data_dir=data_dir, preparation=(plan, clips)).download_and_prepare()
    return {**_read_report(folder), "already_prepared": False}


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Holds a lock on `data_dir`, which ends with the process however that ends."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--data_dir: cannot make {data_dir}: {error.strerror}") from error
    with open(data_dir / ".prepare_jester.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is preparing {data_dir}: wait for it") from error
        yield


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} is there, but {REPORT_NAME} in it is not whole: it was not written by this "
            "command, or was changed since; remove the folder to prepare it anew"
        ) from error


def _finished(folder: Path, plan: Plan, source: ClipSource) -> dict[str, Any]:
    """The report of the set that lies there, if it is the one that is asked for."""
    report = _read_report(folder)
    asked = {**plan.settings, "source": source.description}
    had = report.get("prepared_with", {})
    differing = [key for key in asked if had.get(key) != asked[key]]
    if differing:
        raise ValueError(
            f"{folder} holds a set that was prepared with another {', '.join(differing)}: name "
            "another --data_dir, or remove that folder to prepare it anew"
        )
    return report


def _check_space(data_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise OSError(
            f"{data_dir} has {free / 1e9:.1f} GB free, but about {needed / 1e9:.1f} GB are needed: "
            "free some, or name another --data_dir"
        )
