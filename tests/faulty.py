"""What goes wrong, on purpose: files that rot, and a source whose worker processes end."""

import dataclasses
import os
from pathlib import Path

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


def flip(file: Path) -> None:
    """One bit in every hundred bytes: a single one may lie in a part that no reader uses."""
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 2 % 100, len(content), 100):
        content[place] ^= 0x10
    file.write_bytes(content)


def largest(arrays: Path) -> Path:
    """The largest of the files that hold the numbers; what else is beside them may outgrow it."""
    files = (f for f in (arrays / "ocdbt.process_0").rglob("*") if f.is_file())
    return max(files, key=lambda f: f.stat().st_size)
