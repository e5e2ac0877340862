"""What happens to a clip's frames: decoding with resizing, and the reference's channel planes."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

RESIZES = ("squash", "short_side")
# How JPEG frames are resized. "pillow": pixel for pixel the reference's | "fast": OpenCV, without
# Pillow's wide filter. Both are decoded to the same pixels.
DECODERS = ("pillow", "fast")
_FAST_LEAST_SHRINK = 2.0  # from here on bilinear sampling would leave pixels out
# Start-of-frame markers (ITU-T T.81, table B.1) of Huffman-coded JPEGs: baseline, extended,
# progressive.
_FRAME_MARKERS = (0xC0, 0xC1, 0xC2)
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # tables and an extension, among the numbers of the frames
_SCAN = 0xDA


def decode_image(file: str | Path | io.BytesIO, name: str = "") -> np.ndarray:
    """Reads one image file.

    Grey and colour JPEGs are decoded by OpenCV, in less than half of Pillow's time, where its
    library gives Pillow's pixels (which is tried once in each process); the rest by Pillow.

    Args:
        file: a path, or the file's bytes.
        name: what messages call it; by default the path.

    Returns:
        uint8 [H, W, 3], RGB, perhaps read-only: bit for bit
        `PIL.Image.open(file).convert("RGB")`, as the reference reads it.

    Raises:
        ValueError: the file is empty, cut short or no image, or cannot be read; it is named.
    """
    frame = _decode_with_opencv(file) if _decode_alike() else None
    if frame is not None:
        return frame
    name = name or str(file)
    try:
        return _decode_with_pillow(file)
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


def _decode_with_pillow(file: str | Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _decode_with_opencv(file: str | Path | io.BytesIO) -> np.ndarray | None:
    """uint8 [H, W, 3], RGB; None for what is better left to Pillow, or that it shall explain."""
    import cv2

    try:
        if isinstance(file, io.BytesIO):
            data = file.getvalue()
        else:
            with open(file, "rb") as opened:
                data = opened.read()
        if _num_components(data) not in (1, 3):
            return None
        # As Pillow, it does not turn the picture by what its EXIF data may say.
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (OSError, cv2.error):
        return None


def _num_components(data: bytes) -> int:
    """Colours of an 8-bit JPEG; 0 for anything else, and where its header is damaged.

    The two libraries make RGB of four inks, of more bits and of other kinds of files each in its
    own way.
    """
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker in _FRAME_MARKERS:
            return data[at + 9] if data[at + 4] == 8 else 0
        if marker == _SCAN or (0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES):
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return 0


@functools.cache
def _decode_alike() -> bool:
    """Whether OpenCV and Pillow decode grey and colour JPEGs to the same pixels, as built here."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    for picture in (pixels, pixels[..., 0]):
        for options in ({}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", **options)
            ours = _decode_with_opencv(file)
            if ours is None or not np.array_equal(ours, _decode_with_pillow(file)):
                logging.info("OpenCV decodes JPEG otherwise than Pillow here: Pillow is used")
                return False
    return True


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
