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
    """The clips of one split. Threads may share one; worker processes get it pickled.

    Attributes:
        name: "train", "validation" or "test".
        ids: one id per clip.
        labels: class index per clip, int32 [num_clips]; of several labels per clip, float32
            [num_clips, K] of 0 and 1; None where the data gives none.
        class_names: in index order.
    """

    name: str
    ids: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...]

    def read(self, index: int, choose: ChooseFrames) -> list[np.ndarray]:
        """Decodes the frames of clip `index` that `choose` names, and no others if it can.

        Returns:
            uint8 [H, W, 3], RGB, as stored: one per index that `choose` gave, in its order.

        Raises:
            ValueError: a frame or the video is damaged; the message names the file.
            FileNotFoundError: it is gone.
        """
        ...

    def select(self, ids: Sequence[str]) -> Source:
        """The clips `ids` alone, in that order.

        Raises:
            ValueError: an id is not in the split, or given twice.
        """
        ...
