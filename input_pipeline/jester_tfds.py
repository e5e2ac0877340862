"""20BN-Jester from the TFDS data set that `scripts/prepare_jester.py` writes: a `Source`."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from input_pipeline import jester, transforms
from input_pipeline.source import ChooseFrames, VideoInfo, few, rows_of

_PREPARE = "python scripts/prepare_jester.py --source=DIR --data_dir={}"


class JesterTFDS:
    """The clips of one split, in the order of its CSV; see `source.Source`.

    Nothing is opened before the first `read`, and a pickled copy opens the files anew. Threads may
    share one.

    Attributes:
        name: "train", "validation" or "test".
        ids: one id per clip.
        labels: class index per clip, int32 [num_clips]; None where the CSV gave no labels.
        class_names: in index order.
    """

    def __init__(
        self,
        data_dir: str,
        name: str,
        ids: tuple[str, ...],
        labels: np.ndarray | None,
        class_names: tuple[str, ...],
        stored: np.ndarray,
        num_missing: int = 0,
    ):
        """Opens nothing yet; `read_split` makes one.

        Args:
            data_dir: where TFDS keeps its data sets.
            name: the split.
            ids: one id per clip.
            labels: int32 [num_clips], or None.
            class_names: in index order.
            stored: int64 [num_clips, 2]: number of the clip's record, and the label in it.
            num_missing: clips of the CSV that were left out when the set was prepared.
        """
        self.name = name
        self.ids = ids
        self.labels = labels
        self.class_names = class_names
        self.num_missing = num_missing
        self._data_dir = data_dir
        self._stored = stored
        self._records: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves open files and the lock behind."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_records", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The files are opened by the first `read`."""
        self.__dict__.update(state)
        self._records = None
        self._lock = threading.Lock()

    def read(self, index: int, choose: ChooseFrames) -> list[np.ndarray]:
        """Decodes the frames of clip `index` that `choose` names, each once, and no others.

        Returns:
            uint8 [H, W, 3], RGB, as stored: one per index that `choose` gave, in its order; bit
            for bit those of the JPEG files.

        Raises:
            ValueError: a frame or a shard is damaged, or holds another clip than the metadata says.
            FileNotFoundError: a shard is gone.
        """
        clip_id = self.ids[index]
        frames = self._frames(index)
        decoded: dict[int, np.ndarray] = {}
        chosen = [int(i) for i in choose(VideoInfo(num_frames=len(frames)))]
        for i in chosen:
            if i not in decoded:
                place = f"{i + 1} of {len(frames)} of the clip {clip_id!r}"
                place = f"{place} ({self.name}) in {self._data_dir}"
                decoded[i] = transforms.decode_image(io.BytesIO(frames[i]), place)
        return [decoded[i] for i in chosen]

    def video_info(self, index: int) -> VideoInfo:
        """How many frames clip `index` has; reads its record, and raises as `read` does."""
        return VideoInfo(len(self._frames(index)))

    def select(self, ids: Sequence[str]) -> JesterTFDS:
        """The clips `ids` alone, in that order.

        Raises:
            ValueError: an id is not in the split, or given twice.
        """
        rows = rows_of(self, ids)
        labels = None if self.labels is None else self.labels[rows]
        return JesterTFDS(
            self._data_dir,
            self.name,
            tuple(ids),
            labels,
            self.class_names,
            self._stored[rows],
            self.num_missing,
        )

    def _frames(self, index: int) -> list[bytes]:
        """The JPEG bytes of a clip, whose record must say the id and label of the metadata."""
        number, label = self._stored[index].tolist()
        records = self._open()
        try:
            record = records[number]
        except (FileNotFoundError, ValueError):
            raise
        except Exception as error:  # ArrayRecord's and protobuf's own words for damaged bytes
            text = " ".join(str(error).split())
            if "No such file" in text:
                raise FileNotFoundError(
                    f"a shard of {self._data_dir} is gone: {text}; prepare the set anew"
                ) from error
            raise ValueError(
                f"cannot read the clip {self.ids[index]!r} (record {number} of {self.name}) in "
                f"{self._data_dir}: {text}; remove that set and prepare it anew"
            ) from error
        found = (record["id"].decode(), int(record["label"]))
        if found != (self.ids[index], label):
            raise ValueError(
                f"record {number} of {self.name} in {self._data_dir} is the clip {found[0]!r} with "
                f"label {found[1]}, where its metadata says {self.ids[index]!r} with {label}: the "
                "two are not of one preparation; remove that set and prepare it anew"
            )
        return list(record["frames"])

    def _open(self) -> Any:
        with self._lock:
            if self._records is None:
                self._records = _builder(self._data_dir).as_data_source(self.name)
            return self._records


def read_split(
    data_dir: str | Path,
    split: str,
    classes: Sequence[str] = (),
    name: str = "jester",
) -> JesterTFDS:
    """Opens a split of a prepared set as `jester.read_split` opens one of folders.

    No CSV is read: the set's own metadata holds ids, labels and their order. The clips, their
    order, their labels and the choice of classes are those of the folders and CSV files that the
    set was prepared from.

    Args:
        data_dir: what `scripts/prepare_jester.py` got as `--data_dir`.
        split: "train", "validation" or "test".
        classes: names in index order; () means `jester.CLASS_NAMES`.
        name: what the config calls the data; only used in messages.

    Raises:
        ValueError: a class is wrong or was left out in preparing, or the set's files contradict
            each other.
        FileNotFoundError: the set or the split is missing.
    """
    metadata, num_records, folder = _read_metadata(Path(data_dir), name)
    if split not in metadata["splits"]:
        raise FileNotFoundError(
            f"{folder} has no split {split!r}; splits present: "
            f"{', '.join(metadata['splits'])}. Prepare it again with the CSV of that split, or "
            "choose a split that is there"
        )
    known = tuple(metadata["class_names"])
    class_names = tuple(classes) or jester.CLASS_NAMES
    jester.check_classes(class_names, known)
    left_out = [c for c in classes if metadata["classes"] and c not in metadata["classes"]]
    if left_out:
        raise ValueError(
            f"dataset.classes: {folder} was prepared without {few(left_out)}, with "
            f"{few(metadata['classes'])} alone; name some of these, or prepare it anew"
        )
    table = metadata["splits"][split]
    _check_table(table, num_records.get(split), len(known), f"{folder}, split {split!r}")
    if table["num_left_out"]:
        logging.warning(
            "%s: %d clips of the %s CSV were missing or empty when the set was prepared",
            *(folder, table["num_left_out"], split),
        )
    rows = list(range(len(table["ids"])))
    if table["labels"] is not None:
        csv_rows = [
            jester.Row(row + 1, table["ids"][row], known[table["labels"][row]]) for row in rows
        ]
        jester.check_coverage(csv_rows, folder, split, class_names, explicit=bool(classes))
        rows = [row for row in rows if known[table["labels"][row]] in class_names]
    if not rows:
        raise ValueError(
            f"{folder} holds no clip of the classes wanted ({few(class_names)}) in the "
            f"{split} split: name others in dataset.classes, or leave it empty"
        )
    return _source(str(data_dir), split, table, rows, known, class_names)


def _source(
    data_dir: str,
    split: str,
    table: dict[str, Any],
    rows: Sequence[int],
    known: tuple[str, ...],
    class_names: tuple[str, ...],
) -> JesterTFDS:
    stored_labels = table["labels"] or [-1] * len(table["ids"])
    index = {class_name: i for i, class_name in enumerate(class_names)}
    labels = None
    if table["labels"] is not None:
        labels = np.array([index[known[stored_labels[row]]] for row in rows], np.int32)
    stored = np.array([(table["records"][row], stored_labels[row]) for row in rows], np.int64)
    ids = tuple(table["ids"][row] for row in rows)
    num_missing = table["num_left_out"]
    return JesterTFDS(data_dir, split, ids, labels, class_names, stored, num_missing)


def _builder(data_dir: str | Path) -> Any:
    from input_pipeline.jester_dataset_builder import Jester  # brings TFDS

    return Jester(data_dir=data_dir)


def _read_metadata(data_dir: Path, name: str) -> tuple[dict[str, Any], dict[str, int], Path]:
    """Returns the metadata, the number of records per split, and the set's folder."""
    from input_pipeline import jester_dataset_builder  # brings TFDS

    folder = jester_dataset_builder.dataset_folder(data_dir)
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"dataset.data_dir: there is no prepared {name} in {data_dir} (looked for "
            f"{folder}/dataset_info.json): prepare it with {_PREPARE.format(data_dir)}, or set "
            "--config.dataset.data_dir"
        )
    remedy = "remove that folder and prepare it anew"
    try:
        info = _builder(data_dir).info
    except Exception as error:  # TFDS lets json's, protobuf's and its own errors through
        text = " ".join(str(error).split())
        raise ValueError(f"cannot read the data set in {folder}: {text}; {remedy}") from error
    metadata = dict(info.metadata or {})
    if metadata.get("format") != jester_dataset_builder.FORMAT:
        raise ValueError(
            f"{folder}/metadata.json has format {metadata.get('format')!r}, expected "
            f"{jester_dataset_builder.FORMAT}: {remedy}"
        )
    num_records = {split: split_info.num_examples for split, split_info in info.splits.items()}
    return metadata, num_records, folder


def _check_table(
    table: dict[str, Any], num_records: int | None, num_known: int, place: str
) -> None:
    """Refuses metadata that contradicts itself or the shards."""
    count = len(table["ids"])
    labels = table["labels"]
    whole = (
        sorted(table["records"]) == list(range(count))
        and (labels is None or len(labels) == count)
        and all(0 <= label < num_known for label in labels or ())
    )
    if not whole or num_records != count:
        raise ValueError(
            f"{place}: the metadata names {count} clips and the shards hold {num_records}, or its "
            "lists do not fit together; remove that folder and prepare it anew"
        )
