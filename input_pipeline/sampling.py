"""Which frames of a video make the clip, and in which order."""

from __future__ import annotations

import zlib

import numpy as np

SHORT_CLIPS = ("repeat_last", "ragged")
FRAME_ORDERS = ("forward", "shuffled", "single")


def head_indices(num_available: int, num_frames: int, stride: int) -> np.ndarray:
    """Returns frames 0, k, 2k, ... of a video, k = stride, as far as it and the clip reach.

    Args:
        num_available: frames of the video, from 1.
        num_frames: T, the most frames to take, from 1.
        stride: k, source frames from one taken frame to the next, from 1.

    Returns:
        Indices into the video, counted from 0, int64 [n] with 1 <= n <= T.

    Raises:
        ValueError: an argument is below 1.
    """
    for name, value in (
        ("num_available", num_available),
        ("num_frames", num_frames),
        ("stride", stride),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it counts from 1")
    return np.arange(0, num_available, stride)[:num_frames]


def order_frames(indices: np.ndarray, frame_order: str, *, seed: int, clip_id: str) -> np.ndarray:
    """Applies `dataset.frame_order` to a clip's frames, the same way whenever the clip is read.

    Args:
        indices: the real frames of the clip in their order, int [n].
        frame_order: "forward" (as they are), "shuffled" (a random permutation of them) or "single"
            (one of them, drawn uniformly, n times).
        seed: the config's seed, from 0.
        clip_id: the clip's id; with the seed it alone decides the draw.

    Returns:
        Indices [n].

    Raises:
        ValueError: `frame_order` is none of the three.
    """
    if frame_order == "forward":
        return indices
    random = np.random.default_rng([seed, zlib.crc32(clip_id.encode())])
    if frame_order == "shuffled":
        return random.permutation(indices)
    if frame_order == "single":
        return np.full_like(indices, random.choice(indices))
    raise ValueError(f"frame_order is {frame_order!r}; choose one of: {', '.join(FRAME_ORDERS)}")


def repeat_last(indices: np.ndarray, num_frames: int) -> np.ndarray:
    """Fills a clip [n] up to [num_frames] with its last frame, as the reference does.

    The last one *after* `order_frames`: were it the video's last frame, the tail of a shuffled
    short clip would give away where the video ends.
    """
    return np.pad(indices, (0, num_frames - len(indices)), mode="edge")
