"""What the loader asks of a data set, wherever its clips lie: folders, shards or video files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What must be known of a video to choose frames of it.

    Attributes:
        num_frames: frames that can be read, from 1.
        frame_rate: frames per second; None where the data does not say.
    """

    num_frames: int
    frame_rate: float | None = None


# Which frames to read: from what a video is to indices from 0, int [n] with n from 1. They may
# repeat and need not ascend.
ChooseFrames = Callable[[VideoInfo], np.ndarray]


class Source(Protocol):
    """The clips of one split. Threads may share one; worker processes get it pickled."""

    @property
    def name(self) -> str:
        """Which split: "train", "validation" or "test"."""

    @property
    def ids(self) -> tuple[str, ...]:
        """One id per clip."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class index per clip, int32 [num_clips].

        Of several labels per clip, float32 [num_clips, K] of 0 and 1; None where the data gives
        none.
        """

    @property
    def class_names(self) -> tuple[str, ...]:
        """In index order."""

    @property
    def num_missing(self) -> int:
        """Clips that the data's lists name and that are not there; they are left out."""

    def read(self, index: int, choose: ChooseFrames) -> list[np.ndarray]:
        """Decodes the frames of clip `index` that `choose` names, and no others if it can.

        Returns:
            uint8 [H, W, 3], RGB, as stored: one per index that `choose` gave, in its order.

        Raises:
            ValueError: a frame or the video is damaged; the message names the file.
            FileNotFoundError: it is gone.
        """
        ...

    def video_info(self, index: int) -> VideoInfo:
        """What `read` would tell `choose` of clip `index`; decodes no frame. Raises as `read`."""
        ...

    def select(self, ids: Sequence[str]) -> Source:
        """The clips `ids` alone, in that order.

        Raises:
            ValueError: an id is not in the split, or given twice.
        """
        ...


def rows_of(source: Source, ids: Sequence[str]) -> list[int]:
    """The rows of the clips `ids`, in that order: what `Source.select` takes.

    Raises:
        ValueError: an id is not in the split, or given twice.
    """
    rows = {clip_id: row for row, clip_id in enumerate(source.ids)}
    unknown = [clip_id for clip_id in ids if clip_id not in rows]
    if unknown:
        raise ValueError(
            f"the {source.name} split has no clip {few(unknown)}; its {len(source.ids)} ids begin "
            f"with {', '.join(source.ids[:3])}"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(f"a clip is asked for twice: {', '.join(ids)}")
    return [rows[clip_id] for clip_id in ids]


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are if not all are named."""
    tail = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + tail


def printable(name: str) -> str:
    """A file's name, the bytes in it that are no UTF-8 written as `\\xNN`: ids are text."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
