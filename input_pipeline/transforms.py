"""What happens to a clip's frames: decoding with resizing, and the reference's channel planes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

RESIZES = ("squash", "short_side")


def decode_image(file: str | Path | io.BytesIO, name: str = "") -> np.ndarray:
    """Reads one image file.

    Args:
        file: a path, or the file's bytes.
        name: what messages call it; by default the path.

    Returns:
        uint8 [H, W, 3], RGB, perhaps read-only: bit for bit
        `PIL.Image.open(file).convert("RGB")`, as the reference reads it.

    Raises:
        ValueError: the file is empty, cut short or no image, or cannot be read; it is named.
    """
    name = name or str(file)
    try:
        with Image.open(file) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # The system's word, not Pillow's.
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"cannot read the frame {name}: {error.strerror}") from error
        reason = re.sub(r" (<_io\.BytesIO[^>]*>|'.*')", "", str(error))  # whose name we give
        size = (
            file.getbuffer().nbytes if isinstance(file, io.BytesIO) else Path(file).stat().st_size
        )
        if size == 0:
            reason = "the file is empty"
        raise ValueError(
            f"cannot read the frame {name}: {reason}; expected a whole JPEG: "
            "extract it again, or take its clip out of the CSV"
        ) from error


def resize_array(
    frame: np.ndarray, image_size: int, how: str = "squash", place: float = 0.5
) -> np.ndarray:
    """Makes a frame a square, with Pillow's default filter (BICUBIC for RGB), as the reference.

    Values stay 0...255: the model's side normalises.

    Args:
        frame: uint8 [H, W, 3] of any size, RGB.
        image_size: H = W of the result, in pixels.
        how: "squash": the whole frame, whatever its shape (the reference); "short_side": its
            shape is kept, and of the longer side a part is cut out.
        place: where, 0 (left or top) to 1.

    Returns:
        uint8 [image_size, image_size, 3], perhaps read-only.
    """
    image = Image.fromarray(frame)
    if how == "squash":
        return np.asarray(image.resize((image_size, image_size)))
    scale = image_size / min(image.size)
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    left = round((width - image_size) * place)
    top = round((height - image_size) * place)
    box = (left, top, left + image_size, top + image_size)
    return np.asarray(image.resize((width, height)).crop(box))


def pack_channel_planes(video: np.ndarray) -> np.ndarray:
    """Scrambles a clip as the reference does, by mistake.

    The reference holds a clip as [3, T, H, W] and calls `.view(-1, 3, H, W)` on it without a
    permute. So the three channels of "frame" k are planes 3k, 3k + 1 and 3k + 2 of a sequence of
    all T red planes, then all T green, then all T blue ones.

    Args:
        video: uint8 [T, H, W, 3], T real frames.

    Returns:
        uint8 [T, H, W, 3], contiguous.
    """
    num_frames, height, width, _ = video.shape
    planes = video.transpose(3, 0, 1, 2)  # [3, T, H, W]
    frames = planes.reshape(num_frames, 3, height, width)
    return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))
