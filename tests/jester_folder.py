"""Makes tiny folders in Jester's layouts for the tests of `input_pipeline`."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("Swiping Left", "Swiping Right", "Thumb Up")


def make_clip(folder: Path, num_frames: int, *, size: tuple[int, int] = (20, 14)) -> None:
    """Writes frames 00001.jpg ... of noise that depends on the folder's name and the frame."""
    folder.mkdir(parents=True)
    for number in range(1, num_frames + 1):
        random = np.random.default_rng([zlib.crc32(folder.name.encode()), number])
        width, height = size
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg")


def make_set(
    root: Path,
    splits: dict[str, Iterable[str]],
    *,
    frames: str = "20bn-jester-v1",
    labels: str = "annotations",
    csv_name: str = "jester-v1-{}.csv",
    num_frames: int | None = 2,
) -> Path:
    """Writes one CSV per split from its lines, and a folder for every id in them.

    `num_frames=None` makes videos of 2 to 6 frames, by id.
    """
    (root / labels).mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        lines = list(lines)
        (root / labels / csv_name.format(split)).write_text("".join(f"{line}\n" for line in lines))
        for line in lines:
            clip_id = line.split(";")[0]
            folder = root / frames / clip_id
            if not folder.exists():
                make_clip(folder, num_frames or 2 + zlib.crc32(clip_id.encode()) % 5)
    return root


def labelled(first: int, last: int) -> list[str]:
    """Returns CSV lines for the ids first ... last, the labels taking turns."""
    return [f"{number};{CLASSES[number % 3]}" for number in range(first, last + 1)]


def reference_frame(path: Path, image_size: int) -> np.ndarray:
    """Returns a frame as the reference reads it, before it is scaled to [-1, 1]."""
    return np.array(Image.open(path).convert("RGB").resize((image_size, image_size)))
