"""Which frames of a video make the clip, and in which order."""

from __future__ import annotations

import zlib

import numpy as np

from input_pipeline.source import VideoInfo

SAMPLINGS = ("head", "uniform", "random", "dense")
SHORT_CLIPS = ("repeat_last", "ragged")
FRAME_ORDERS = ("forward", "shuffled", "single")


def choose_frames(
    info: VideoInfo,
    how: str,
    num_frames: int,
    *,
    stride: float = 1,
    frame_rate: float = 1.0,
    place: float = 0.5,
    random: np.random.Generator | None = None,
) -> np.ndarray:
    """Chooses the frames of a clip, none of them twice.

    "head": frames 0, k, 2k, ... of the video, k = `stride`, as far as it and the clip reach (the
    reference). "dense": the same from another beginning. "uniform": the video cut in `num_frames`
    equal parts, a frame of each. "random": the same, drawn anew in each part.

    In a video that says its frames per second, k frames at `frame_rate` are what counts for "head"
    and "dense": the frame nearest to each moment, as streaming prediction takes them. A slower
    video gives every frame.

    Args:
        info: of the video.
        how: one of `SAMPLINGS`.
        num_frames: T, the most frames to take, from 1.
        stride: k, above 0; below 1 it is taken for 1.
        frame_rate: frames per second that `stride` counts.
        place: which of several views of a video, 0 to 1: where "dense" begins, from the first
            place to the last possible; where in each part "uniform" takes its frame.
        random: draws for training. Without it "dense" and "random" do what `place` says.

    Returns:
        Indices into the video, counted from 0 and ascending, int64 [n] with 1 <= n <= T.

    Raises:
        ValueError: a number is below 1, `stride` not above 0, or `how` is unknown.
    """
    for name, value in (
        ("the number of frames of the video", info.num_frames),
        ("num_frames", num_frames),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it counts from 1")
    if not stride > 0:
        raise ValueError(f"stride is {stride}; it counts from 1")
    if how not in SAMPLINGS:
        raise ValueError(f"sampling is {how!r}; choose one of: {', '.join(SAMPLINGS)}")
    if how in ("uniform", "random"):
        return _one_of_each_part(info, num_frames, place, random if how == "random" else None)
    faster = 1.0 if info.frame_rate is None else info.frame_rate / frame_rate
    step = max(1.0, stride * faster)
    start = 0.0
    if how == "dense":
        last_start = max(0.0, info.num_frames - 1 - (num_frames - 1) * step)
        start = last_start * (place if random is None else random.random())
    moments = start + step * np.arange(num_frames)
    indices = np.ceil(moments - 0.5 - 1e-9).astype(np.int64)  # of two as near, the earlier
    return indices[indices < info.num_frames]


def _one_of_each_part(
    info: VideoInfo, num_frames: int, place: float, random: np.random.Generator | None
) -> np.ndarray:
    count = min(info.num_frames, num_frames)
    edges = info.num_frames * np.arange(count + 1) // count  # whole frames: no frame is in two
    widths = np.diff(edges)
    shares = np.full(count, place) if random is None else random.random(count)
    return edges[:-1] + np.minimum((shares * widths).astype(np.int64), widths - 1)


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
