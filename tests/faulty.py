"""A source of clips whose worker processes end by themselves."""

import dataclasses
import os

import numpy as np

from input_pipeline.source import VideoInfo


@dataclasses.dataclass(frozen=True)
class EndsItsProcess:
    """Eight clips of one grey frame; reading clip 5 ends the process that reads it, with code 0."""

    name: str = "train"
    ids: tuple[str, ...] = tuple("abcdefgh")
    class_names: tuple[str, ...] = ("one", "two")
    num_missing: int = 0

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self.ids), np.int32)

    def read(self, index: int, choose) -> list[np.ndarray]:
        if index == 5:
            os._exit(0)
        return [np.full((8, 8, 3), index, np.uint8) for _ in choose(VideoInfo(1))]
