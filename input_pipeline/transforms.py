"""What happens to a clip's frames: decoding with resizing, and the reference's channel planes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def resize_frame(path: str | Path, image_size: int) -> np.ndarray:
    """Reads one frame, resized to a square whatever its shape, with Pillow's default filter.

    Bit for bit `PIL.Image.open(path).convert("RGB").resize((image_size, image_size))`, as the
    reference reads it; Pillow's default for RGB is BICUBIC. Values stay 0...255: the model's side
    normalises.

    Args:
        path: an image file.
        image_size: H = W, in pixels.

    Returns:
        uint8 [H, W, 3], perhaps read-only.

    Raises:
        ValueError: the file is empty, cut short or no image, or cannot be read; it is named.
    """
    try:
        with Image.open(path) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return np.asarray(rgb.resize((image_size, image_size)))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # the system's word, not Pillow's
            raise ValueError(f"cannot read the frame {path}: {error.strerror}") from error
        reason = str(error).replace(f" {str(path)!r}", "")
        if Path(path).stat().st_size == 0:
            reason = "the file is empty"
        raise ValueError(
            f"cannot read the frame {path}: {reason}; expected a whole JPEG: "
            "extract it again, or take its clip out of the CSV"
        ) from error


def resize_array(frame: np.ndarray, image_size: int) -> np.ndarray:
    """`resize_frame` for a frame in memory: uint8 [H, W, 3] of any size, RGB."""
    return np.asarray(Image.fromarray(frame).resize((image_size, image_size)))


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
