"""What happens to a clip's frames: decoding with resizing, and the reference's channel planes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

RESIZES = ("squash", "short_side")
# Of JPEG frames. "pillow": pixel for pixel the reference's | "fast": OpenCV, which decodes the same
# pixels and resizes without Pillow's wide filter.
DECODERS = ("pillow", "fast")
_FAST_LEAST_SHRINK = 2.0  # from here on bilinear sampling would leave pixels out


def decode_image(
    file: str | Path | io.BytesIO, name: str = "", *, decoder: str = "pillow"
) -> np.ndarray:
    """Reads one image file.

    Args:
        file: a path, or the file's bytes.
        name: what messages call it; by default the path.
        decoder: one of `DECODERS`. What OpenCV cannot read goes to Pillow after all.

    Returns:
        uint8 [H, W, 3], RGB, perhaps read-only: with "pillow" bit for bit
        `PIL.Image.open(file).convert("RGB")`, as the reference reads it; with "fast" the same for
        grey and colour JPEGs, not for those of four inks (CMYK).

    Raises:
        ValueError: the file is empty, cut short or no image, or cannot be read; it is named.
    """
    if decoder == "fast":
        frame = _decode_with_opencv(file)
        if frame is not None:
            return frame
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


def _decode_with_opencv(file: str | Path | io.BytesIO) -> np.ndarray | None:
    """uint8 [H, W, 3], RGB; None where it cannot be read, of which Pillow will say why."""
    import cv2

    try:
        data = file.getbuffer() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
        # As Pillow, it does not turn the picture by what its EXIF data may say.
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (OSError, cv2.error):
        return None


def resize_array(
    frame: np.ndarray,
    image_size: int,
    how: str = "squash",
    place: float = 0.5,
    *,
    decoder: str = "pillow",
) -> np.ndarray:
    """Makes a frame a square, with Pillow's default filter (BICUBIC for RGB), as the reference.

    Values stay 0...255: the model's side normalises.

    Args:
        frame: uint8 [H, W, 3] of any size, RGB.
        image_size: H = W of the result, in pixels.
        how: "squash": the whole frame, whatever its shape (the reference); "short_side": its
            shape is kept, and of the longer side a part is cut out.
        place: where, 0 (left or top) to 1.
        decoder: one of `DECODERS`. Deviation: "fast" is OpenCV's bilinear sampling, and its mean
            over areas where a frame shrinks to half or less.

    Returns:
        uint8 [image_size, image_size, 3], perhaps read-only.
    """
    size = frame.shape[1::-1]  # width, height
    left = top = 0
    if how == "squash":
        width = height = image_size
    else:
        scale = image_size / min(size)
        width, height = (max(image_size, round(side * scale)) for side in size)
        left = round((width - image_size) * place)
        top = round((height - image_size) * place)
    if decoder == "fast":
        resized = _resize_with_opencv(frame, width, height)
        return resized[top : top + image_size, left : left + image_size]
    image = Image.fromarray(frame).resize((width, height))
    if how != "squash":
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def _resize_with_opencv(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    import cv2

    rows, columns = frame.shape[:2]
    if max(rows / height, columns / width) >= _FAST_LEAST_SHRINK:
        # OpenCV takes the mean over areas only where no side grows.
        smaller = (min(width, columns), min(height, rows))
        frame = cv2.resize(frame, smaller, interpolation=cv2.INTER_AREA)
    # The same bits on every processor, unlike its plain bilinear sampling.
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)


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
