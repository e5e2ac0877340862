"""Draws gesture videos in 20BN-Jester's own layout, for want of Jester: a data set in minutes.

    python -m input_pipeline.gestures --output=data/gestures --classes=time

A drawn hand performs Jester's 27 gestures before a drawn person. Clips are 100 pixels high, of
several widths, 28 to 43 frames long at 12 frames a second. A folder holds, as Jester's does,

    20bn-jester-v1/<id>/00001.jpg …                          ids 1 … N over all splits
    annotations/jester-v1-{train,validation,test}.csv        lines `id;label`
    annotations/jester-v1-labels.csv                         one label a line
    gestures.json                                            what was drawn; there when all is done

(unlike Jester's, the test clips have labels). `unfinished.json` in place of `gestures.json` marks a
folder whose making was interrupted; the same call goes on with it.

Directions are those of the image: in Swiping Left the hand moves to the image's left, and Turning
Hand Clockwise turns like the hands of a clock that the viewer reads. Away is away from the person,
towards the camera; a hand that rolls forward comes towards the camera over the top of its circle.
Zooming In opens the fingers, Zooming Out closes them.

Gestures that differ only in time cannot be told from one frame: every drawing of such a gesture
gives two clips, forwards and backwards, made of the very same JPEG files (as hard links where the
file system has them), so both classes hold the same frames. No other shortcut is left either:
which of a gesture's mirrored and reversed versions was drawn first is decided by a fair coin.
"""

from input_pipeline.command_line import Parser, leave_at_once, run, suggest

if __name__ == "__main__":
    leave_at_once()  # the imports below take seconds

import argparse
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import tqdm

from input_pipeline.cpus import num_cpus
from input_pipeline.hand import Motion, draw_frames, draw_hand_mask, wander
from input_pipeline.jester import CLASS_NAMES, MIRRORED, REVERSED, SPLITS
from input_pipeline.source import few

VERSION = 1  # of the drawings; a change of anything that is drawn is a new version
TIME_CLASSES = (  # four pairs that only the order of their frames tells apart
    "Swiping Left",
    "Swiping Right",
    "Swiping Down",
    "Swiping Up",
    "Pushing Hand Away",
    "Pulling Hand In",
    "Turning Hand Clockwise",
    "Turning Hand Counterclockwise",
)

_MANIFEST, _UNFINISHED = "gestures.json", "unfinished.json"
_VIDEOS, _ANNOTATIONS = "20bn-jester-v1", "annotations"
# All one more than a multiple of 3: read at every third frame, as `configs/gestures.py` does, a
# clip and its reversal still show the very same frames.
_NUM_FRAMES = (28, 31, 34, 37, 40, 43)
_DRAWINGS_PER_TASK = 8


# ---- what hands do: one function a gesture; its mirror image and its reversal come free ----


@dataclasses.dataclass(frozen=True)
class _Pose:
    """Fingers: see the fields of the same names in `Motion`."""

    extension: tuple[float, float, float, float, float]
    spread: float
    thumb: float


_OPEN = _Pose((1, 1, 1, 1, 1), 0.35, 0.65)
_FLAT = _Pose((1, 1, 1, 1, 1), 0.0, 0.3)
_FANNED = _Pose((1, 1, 1, 1, 1), 1.0, 1.1)
_RELAXED = _Pose((0.8, 0.75, 0.7, 0.68, 0.65), 0.15, 0.45)
_CLOSED = _Pose((0.7, 0.22, 0.2, 0.2, 0.22), 0.0, 0.05)
_FIST = _Pose((0.4, 0.02, 0.0, 0.0, 0.02), 0.0, -0.6)
_TWO_FINGERS = _Pose((0.4, 1, 1, 0.02, 0.02), 0.1, -0.6)
_PINCH = _Pose((0.9, 0.8, 0.05, 0.03, 0.02), -0.4, 0.0)
_APART = _Pose((1.0, 1.0, 0.05, 0.03, 0.02), 0.6, 1.25)
_THUMB_OUT = _Pose((1.0, 0.02, 0.0, 0.0, 0.02), 0.0, 1.5)


def _ease(t: np.ndarray, start: float, end: float) -> np.ndarray:
    """0 before `start`, 1 after `end`, smooth between."""
    u = np.clip((t - start) / (end - start), 0, 1)
    return u * u * (3 - 2 * u)


class _Take:
    """What every gesture begins with: somebody's hand, and when it rises, acts and is lowered."""

    def __init__(self, rng: np.random.Generator, num_frames: int, acting=(10, 17)):
        self.rng, self.num_frames = rng, num_frames
        self.side = int(rng.choice((-1, 1)))  # the arm is at the image's left (-1) or right (1)
        self.size = rng.uniform(0.095, 0.128)
        self.elbow = np.array([self.side * rng.uniform(0.25, 0.55), rng.uniform(1.2, 1.35)])
        self.centre = np.array([self.side * rng.uniform(-0.05, 0.25), rng.uniform(0.45, 0.6)])
        # Frames of waiting, rising, holding, acting, holding, sinking, waiting. A wait below 0
        # cuts into the rise or fall, as recordings that begin late or end early do.
        low = (-3, 3.5, 0, acting[0], 0, 3.5, -3)
        high = (3, 6, 2.5, acting[1], 2.5, 6, 3)
        spans = rng.uniform(low, high)
        times = np.cumsum(spans * num_frames / spans.sum())
        t = np.arange(num_frames) + 0.5
        self.rise = _ease(t, times[0], times[1])  # [T]
        self.fall = _ease(t, times[4], times[5])
        self.progress = _ease(t, times[2], times[3])  # of the gesture itself
        self.clock = np.clip((t - times[2]) / (times[3] - times[2]), 0, 1)  # the same, even
        self.acting_frames = times[3] - times[2]

    def motion(self, place, poses: Sequence[_Pose], **overrides) -> Motion:
        """The whole clip, from what the raised hand does.

        Args:
            place: where the raised hand is, [T, 2] or [2].
            poses: one pose, or two: from the first to the second as the gesture goes on.
            overrides: further fields of `Motion`; `turn` replaces the lean of the forearm.
        """
        rng, num_frames = self.rng, self.num_frames
        place = np.broadcast_to(place, (num_frames, 2))
        raised = (self.rise * (1 - self.fall))[:, None]
        near = rng.uniform(0.3, 1)  # 1: the hand rises straight from below to its place
        x = self.elbow[0] + near * (place[:, 0] - self.elbow[0])
        below = np.stack([x, np.full(num_frames, 1.5)], axis=-1)
        tremor = np.stack([wander(rng, num_frames, 4), wander(rng, num_frames, 4)], axis=-1)
        place = below + raised * (place - below) + 0.006 * tremor
        lean = 0.6 * (place[:, 0] - self.elbow[0]) + rng.normal(0, 0.08)
        fields = {
            "size": self.size + np.zeros(num_frames),
            "turn": lean + 0.03 * wander(rng, num_frames, 4),
            "pitch": rng.uniform(0, 0.35) + np.zeros(num_frames),
            "elbow": self.elbow,
            "thumb_side": -self.side,
            **_finger_fields(rng, poses, self.progress),
            **overrides,
        }
        return Motion(place=place, **fields)


def _finger_fields(rng, poses: Sequence[_Pose], progress: np.ndarray) -> dict[str, np.ndarray]:
    first, last = poses[0], poses[-1]

    def between(a, b, deviation):
        a, b = np.atleast_1d(a), np.atleast_1d(b)
        return a + progress[:, None] * (b - a) + rng.normal(0, deviation, len(a))

    return {
        "extension": np.clip(between(first.extension, last.extension, 0.03), 0, 1),
        "spread": between(first.spread, last.spread, 0.1)[:, 0],
        "thumb": between(first.thumb, last.thumb, 0.08)[:, 0],
    }


def _path(start, end, progress) -> np.ndarray:
    start, end = np.asarray(start), np.asarray(end)
    return start + progress[:, None] * (end - start)


def _sweep_left(rng, num_frames, poses) -> Motion:
    take = _Take(rng, num_frames)
    reach, bow = rng.uniform(0.36, 0.56), rng.normal(0, 0.05)
    x, y = rng.uniform(-0.06, 0.06), take.centre[1]
    tilt = rng.normal(0, 0.05)
    place = _path((x + reach, y - tilt), (x - reach, y + tilt), take.progress)
    place[:, 1] -= bow * np.sin(np.pi * take.progress)
    return take.motion(place, poses)


def _sweep_down(rng, num_frames, poses) -> Motion:
    take = _Take(rng, num_frames)
    x, drift = take.centre[0], rng.normal(0, 0.05)
    top, bottom = rng.uniform((0.2, 0.72), (0.32, 0.86))
    place = _path((x - drift, top), (x + drift, bottom), take.progress)
    # The hand comes up in a curve at its side of the body, and so is seen to move mostly down.
    aside = 4 * take.rise * (1 - take.rise)
    place[:, 0] += take.side * rng.uniform(0.15, 0.4) * aside
    return take.motion(place, poses)


def _push(rng, num_frames, poses) -> Motion:
    take = _Take(rng, num_frames)
    drift = rng.normal((0, -0.05), 0.04)  # mostly a little up
    place = _path(take.centre - drift, take.centre + drift, take.progress)
    small, large = rng.uniform(0.58, 0.72), rng.uniform(1.2, 1.45)
    size = take.size * small * (large / small) ** take.progress
    return take.motion(place, poses, size=size)


def _roll_forward(rng, num_frames) -> Motion:
    # Slow enough that every third frame still tells which way it goes.
    take = _Take(rng, num_frames, acting=(18, 26))
    turns = np.clip(take.acting_frames / rng.uniform(8, 12), 1.5, 3)
    phase = 2 * np.pi * (turns * take.clock + rng.random())
    high = rng.uniform(0.11, 0.16)
    place = take.centre + np.stack([0.02 * np.sin(phase), -high * np.cos(phase)], axis=-1)
    # Over the top it comes forward, so it grows there, and is nearest a quarter turn later.
    size = take.size * (1 + rng.uniform(0.25, 0.35) * np.sin(phase))
    elbow = np.array([take.side * rng.uniform(0.95, 1.1), rng.uniform(0.8, 1.0)])
    across = -take.side * rng.uniform(1.0, 1.4) + 0.15 * np.cos(phase)
    return take.motion(
        place, [_RELAXED], size=size, turn=across, pitch=0.2 + 0.2 * np.cos(phase), elbow=elbow
    )


def _turn_clockwise(rng, num_frames) -> Motion:
    take = _Take(rng, num_frames)
    angle = rng.uniform(1.3, 2.5)  # 75 to 143 degrees, about the wrist
    turn = rng.normal(0, 0.12) + angle * (take.progress - 0.5)
    wrist = take.centre + np.array((0, take.size))
    place = wrist + take.size * np.stack([np.sin(turn), -np.cos(turn)], axis=-1)
    return take.motion(place, [_FANNED], turn=turn)


def _zoom_in(rng, num_frames, poses) -> Motion:
    take = _Take(rng, num_frames)
    return take.motion(take.centre, poses, pitch=np.full(num_frames, rng.uniform(0, 0.2)))


def _thumb(rng, num_frames, up: bool) -> Motion:
    take = _Take(rng, num_frames, acting=(14, 22))
    bob = rng.uniform(0, 0.03) * np.sin(2 * np.pi * num_frames / 12 * take.clock)
    place = take.centre + np.stack([0 * bob, bob], axis=-1)
    low, high = (0.75, 1.0) if up else (0.5, 0.75)
    elbow = np.array([take.side * rng.uniform(0.95, 1.1), rng.uniform(low, high)])
    # A fist lies sideways, knuckles away from the elbow. A raised thumb then shows the back of
    # the hand, a lowered one its palm.
    turn = -take.side * rng.uniform(1.35, 1.65) + 0.03 * wander(rng, num_frames, 4)
    thumb_side = take.side if up else -take.side
    return take.motion(place, [_THUMB_OUT], turn=turn, elbow=elbow, thumb_side=thumb_side)


def _shake(rng, num_frames) -> Motion:
    take = _Take(rng, num_frames, acting=(14, 22))
    phase = 2 * np.pi * take.acting_frames / rng.uniform(6, 9) * take.clock
    swing = rng.uniform(0.3, 0.55) * np.sin(phase)
    turn = 0.6 * (take.centre[0] - take.elbow[0]) + swing
    place = take.centre + np.stack([0.2 * swing, 0 * swing], axis=-1)
    return take.motion(place, [_OPEN], turn=turn)


def _stop(rng, num_frames) -> Motion:
    take = _Take(rng, num_frames, acting=(14, 22))
    forward = 0.85 + 0.25 * take.rise
    return take.motion(take.centre, [_FLAT], size=take.size * forward, pitch=np.zeros(num_frames))


def _drum(rng, num_frames) -> Motion:
    take = _Take(rng, num_frames, acting=(18, 26))
    phase = 2 * np.pi * take.acting_frames / rng.uniform(6, 9) * take.clock
    lag = rng.uniform(0.9, 1.3) * np.array([0, 0, 1, 2, 3])
    extension = 0.62 + 0.38 * np.cos(phase[:, None] - lag)
    extension[:, 0] = 0.9
    return take.motion(take.centre, [_OPEN], extension=extension)


def _nothing(rng, num_frames) -> Motion:
    take = _Take(rng, num_frames)
    place = np.tile([take.elbow[0], 1.6], (num_frames, 1))
    if rng.random() < 0.3:  # a resting hand's knuckles at the lower edge
        place[:, 1] = rng.uniform(0.98, 1.1)
    take.rise, take.fall = np.ones(num_frames), np.zeros(num_frames)  # it stays there
    return take.motion(place, [_FIST])


def _something_else(rng, num_frames) -> Motion:
    take = _Take(rng, num_frames, acting=(18, 26))
    anchors = [  # eye, top of the head, ear, mouth, other shoulder, chest, beside the head, table
        (0.05, 0.33), (0.1, 0.14), (0.2, 0.33), (0.0, 0.45),
        (-0.35, 0.62), (-0.1, 0.75), (0.5, 0.3), (0.45, 0.92),
    ]  # fmt: skip
    num_stops = rng.integers(2, 5)
    stops = np.array(anchors)[rng.choice(len(anchors), num_stops, replace=False)]
    stops = stops * (take.side, 1) + rng.normal(0, 0.04, stops.shape)
    turns = rng.uniform(-0.9, 0.9, num_stops)
    sizes = take.size * rng.uniform(0.8, 1.15, num_stops)
    place = np.tile(stops[0], (num_frames, 1))
    turn, size = np.full(num_frames, turns[0]), np.full(num_frames, sizes[0])
    for i in range(1, num_stops):  # from stop to stop, with a rest at each
        go = _ease(take.clock, (i - 0.8) / (num_stops - 0.6), i / (num_stops - 0.6))
        place = place + go[:, None] * (stops[i] - stops[i - 1])
        turn = turn + go * (turns[i] - turns[i - 1])
        size = size + go * (sizes[i] - sizes[i - 1])
    rub = rng.uniform(0, 0.05, 2) * (rng.random() < 0.6)  # scratching, wiping
    place += rub * np.sin(2 * np.pi * num_frames / rng.uniform(5, 10) * take.clock)[:, None]
    poses = [(_OPEN, _RELAXED, _CLOSED, _FIST, _PINCH)[i] for i in rng.integers(0, 5, 2)]
    return take.motion(place, poses, size=size, turn=turn)


_GESTURES: dict[str, Callable[[np.random.Generator, int], Motion]] = {
    "Swiping Left": lambda rng, n: _sweep_left(rng, n, [_OPEN]),
    "Swiping Down": lambda rng, n: _sweep_down(rng, n, [_OPEN]),
    "Pushing Hand Away": lambda rng, n: _push(rng, n, [_OPEN]),
    "Sliding Two Fingers Left": lambda rng, n: _sweep_left(rng, n, [_TWO_FINGERS]),
    "Sliding Two Fingers Down": lambda rng, n: _sweep_down(rng, n, [_TWO_FINGERS]),
    "Pushing Two Fingers Away": lambda rng, n: _push(rng, n, [_TWO_FINGERS]),
    "Rolling Hand Forward": _roll_forward,
    "Turning Hand Clockwise": _turn_clockwise,
    "Zooming In With Full Hand": lambda rng, n: _zoom_in(rng, n, [_CLOSED, _FANNED]),
    "Zooming In With Two Fingers": lambda rng, n: _zoom_in(rng, n, [_PINCH, _APART]),
    "Thumb Up": lambda rng, n: _thumb(rng, n, up=True),
    "Thumb Down": lambda rng, n: _thumb(rng, n, up=False),
    "Shaking Hand": _shake,
    "Stop Sign": _stop,
    "Drumming Fingers": _drum,
    "No gesture": _nothing,
    "Doing other things": _something_else,
}


def _versions() -> dict[str, list[tuple[str, bool, bool]]]:
    """Class -> every (gesture above, mirrored?, reversed?) that shows it."""
    versions: dict[str, list[tuple[str, bool, bool]]] = {name: [] for name in CLASS_NAMES}
    for gesture in _GESTURES:
        for mirrored in (False, True):
            name = MIRRORED[gesture] if mirrored else gesture
            versions[name].append((gesture, mirrored, False))
            if name in REVERSED:
                versions[REVERSED[name]].append((gesture, mirrored, True))
    return versions


_VERSIONS = _versions()


def draw_motion(label: str, rng: np.random.Generator) -> Motion:
    """A random motion of the class `label`.

    Drawing evenly among the versions makes the law of the mirrored (reversed) class the mirrored
    (reversed) law, whatever the functions above do.
    """
    versions = _VERSIONS[label]
    gesture, mirrored, backwards = versions[rng.integers(len(versions))]
    motion = _GESTURES[gesture](rng, int(rng.choice(_NUM_FRAMES)))
    motion = motion.mirrored() if mirrored else motion
    return motion.reversed() if backwards else motion


# ---- which clips to draw ----


@dataclasses.dataclass(frozen=True)
class _Clip:
    """One folder of frames."""

    number: int  # its id, the folder's name
    split: str
    label: str
    backwards: bool  # shows its drawing in reverse order


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """One motion drawn once, for one clip or for two: forwards and backwards."""

    seed: tuple[int, ...]
    label: str  # of the drawing forwards
    clips: tuple[_Clip, ...]


def _plan(manifest: dict) -> list[_Drawing]:
    """Every drawing of a data set, the same for the same manifest."""
    wanted = []  # (seed, label, [(split, label, backwards), ...])
    for split_index, split in enumerate(SPLITS):
        counts = _clips_per_class(manifest["classes"], manifest["num_clips"][split])
        for label in counts:
            opposite = REVERSED.get(label)
            if opposite in counts and CLASS_NAMES.index(opposite) < CLASS_NAMES.index(label):
                continue  # drawn with its opposite
            class_seed = (manifest["seed"], split_index, CLASS_NAMES.index(label))
            for i, clips in enumerate(_shared_drawings(label, opposite, counts)):
                wanted.append(((*class_seed, i), label, [(split, *clip) for clip in clips]))

    num_clips = sum(len(clips) for _, _, clips in wanted)
    numbers = iter(np.random.default_rng(manifest["seed"]).permutation(num_clips) + 1)
    return [
        _Drawing(seed, label, tuple(_Clip(int(next(numbers)), *clip) for clip in clips))
        for seed, label, clips in wanted
    ]


def _clips_per_class(classes: Sequence[str], num_clips: int) -> dict[str, int]:
    """How many clips of each class, as even as can be; opposites get the odd ones together."""
    in_pairs = sorted(
        classes, key=lambda name: min(map(CLASS_NAMES.index, (name, REVERSED.get(name, name))))
    )
    each, odd = divmod(num_clips, len(classes))
    return {name: each + (i < odd) for i, name in enumerate(in_pairs)}


def _shared_drawings(label: str, opposite: str | None, counts: dict[str, int]) -> Iterator[list]:
    """Yields for each drawing the clips, (label, backwards), that it makes."""
    if opposite == label:  # backwards it is another clip of the same class
        pairs, odd = divmod(counts[label], 2)
        yield from [[(label, False), (label, True)]] * pairs + [[(label, False)]] * odd
        return
    forwards, backwards = counts[label], counts.get(opposite, 0) if opposite else 0
    for i in range(max(forwards, backwards)):
        yield [(label, False)] * (i < forwards) + [(opposite, True)] * (i < backwards)


# ---- writing them ----


def _write_drawing(videos: Path, drawing: _Drawing) -> int:
    """Draws a motion and writes its clips; returns how many."""
    rng = np.random.default_rng(drawing.seed)
    frames = draw_frames(draw_motion(drawing.label, rng), rng)
    names = [f"{i + 1:05d}.jpg" for i in range(len(frames))]
    written = None  # the folder whose files the second clip shares
    for clip in drawing.clips:
        aside = videos / f".{clip.number}.tmp"
        aside.mkdir()
        for i, name in enumerate(names):
            source = len(frames) - 1 - i if clip.backwards else i
            if not (written and _link(written / names[-1 - i], aside / name)):
                (aside / name).write_bytes(frames[source])
        written = aside.rename(videos / str(clip.number))
    return len(drawing.clips)


def hand_masks(
    output: str | os.PathLike[str], ids: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Where arm and hand are in each frame of some clips of a data set, drawn once more.

    Args:
        output: a finished data set.
        ids: of clips in it; they come in another order.

    Yields:
        (id, bool [T, H, W]), T, H and W those of the clip's files.

    Raises:
        FileNotFoundError: there is no finished data set in `output`.
        ValueError: its `gestures.json` is damaged.
        KeyError: an id is of no clip in it.
    """
    left = set(ids)
    for drawing in _plan(read_manifest(output)):
        wanted = [clip for clip in drawing.clips if str(clip.number) in left]
        if wanted:
            rng = np.random.default_rng(drawing.seed)
            mask = draw_hand_mask(draw_motion(drawing.label, rng), rng)
            for clip in wanted:
                yield str(clip.number), mask[::-1] if clip.backwards else mask
            left.difference_update(str(clip.number) for clip in wanted)
    if left:
        raise KeyError(f"{output} has no clip {min(left)!r}")


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        return False
    return True


def _write_drawings(videos: Path, drawings: list[_Drawing]) -> int:
    return sum(_write_drawing(videos, drawing) for drawing in drawings)


def _start_worker() -> None:
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _write_missing(videos: Path, plan: list[_Drawing], num_workers: int, progress: bool) -> None:
    """Draws whatever clips are not there yet."""
    videos.mkdir(parents=True, exist_ok=True)
    present = set(os.listdir(videos))
    for name in present:
        if re.fullmatch(r"\.\d+\.tmp", name):  # a clip that an interruption cut short
            shutil.rmtree(videos / name)
    missing = []
    for drawing in plan:
        clips = tuple(clip for clip in drawing.clips if str(clip.number) not in present)
        if clips:
            missing.append(dataclasses.replace(drawing, clips=clips))
    total = sum(len(drawing.clips) for drawing in plan)
    left = sum(len(drawing.clips) for drawing in missing)
    step = _DRAWINGS_PER_TASK
    tasks = [missing[i : i + step] for i in range(0, len(missing), step)]
    with tqdm.tqdm(
        desc="drawing gestures",
        unit="clip",
        total=total,
        initial=total - left,
        disable=not progress,
    ) as bar:
        results = _results(videos, tasks, min(num_workers, len(tasks)))
        with contextlib.closing(results):  # ends the workers, whatever stops this loop
            for num_clips in results:
                bar.update(num_clips)


def _results(videos: Path, tasks: list[list[_Drawing]], num_workers: int) -> Generator[int]:
    if num_workers <= 1:
        yield from (_write_drawings(videos, task) for task in tasks)
        return
    executor = concurrent.futures.ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        futures = [executor.submit(_write_drawings, videos, task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise OSError(
            f"{videos}: a drawing process died (killed, out of memory, or started by a script "
            'without `if __name__ == "__main__":`); the same command goes on where it stopped'
        ) from error
    finally:  # also after Ctrl-C or a full disk: the tasks under way end within a second
        executor.shutdown(wait=True, cancel_futures=True)


def _write_annotations(output: Path, manifest: dict, plan: list[_Drawing]) -> None:
    folder = output / _ANNOTATIONS
    folder.mkdir(exist_ok=True)
    clips = sorted((clip for drawing in plan for clip in drawing.clips), key=lambda c: c.number)
    for split in SPLITS:
        lines = [f"{clip.number};{clip.label}\n" for clip in clips if clip.split == split]
        _write_aside(folder / f"jester-v1-{split}.csv", "".join(lines))
    _write_aside(
        folder / "jester-v1-labels.csv", "".join(f"{name}\n" for name in manifest["classes"])
    )


def _write_aside(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all.

    Not `files.written_aside`: its error is worded already, and `generate` words its own.
    """
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    aside.rename(path)


# ---- the data set as a whole ----


def read_manifest(output: str | os.PathLike) -> dict:
    """What a finished folder holds: version, seed, classes and num_clips of each split.

    Raises:
        FileNotFoundError: there is no finished data set in `output`.
        ValueError: its `gestures.json` is damaged.
    """
    return _read_json(Path(output) / _MANIFEST)


def _read_json(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text())
        return {key: manifest[key] for key in ("version", "seed", "classes", "num_clips")}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged; delete the folder {path.parent} to have it made anew"
        ) from error


def generate(
    output: str | os.PathLike,
    *,
    classes: Sequence[str] = CLASS_NAMES,
    train: int = 24_576,
    validation: int = 2_048,
    test: int = 2_048,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> None:
    """Draws a data set into the folder `output`, or goes on with an interrupted one.

    Returns at once where a finished one of the same classes, seed and version lies that has at
    least as many clips. The files depend on nothing but the arguments, whatever `num_workers` is.
    Other processes that call it for the same folder meanwhile wait for this one.

    With several workers the caller's main module is imported in each, so a script needs the
    usual `if __name__ == "__main__":`.

    Args:
        output: a folder that does not exist, is empty, or was made by this function.
        classes: names out of `CLASS_NAMES`; their order does not matter.
        train, validation, test: clips in each split, all classes together.
        seed: 0 or more; another seed gives other clips.
        num_workers: processes that draw; default: one for each processor. 1: this process itself.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: a bad argument, or `output` holds something else.
        OSError: `output` cannot be written, or a drawing process died.
    """
    output = Path(output)
    num_workers = num_cpus() if num_workers is None else num_workers
    if num_workers < 1:
        raise ValueError(f"num_workers must be 1 or more, not {num_workers}")
    manifest = _manifest(classes, {"train": train, "validation": validation, "test": test}, seed)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _sole_writer(output, progress):
            if _is_finished(output, manifest):
                return
            _write_aside(output / _UNFINISHED, json.dumps(manifest, indent=1) + "\n")
            plan = _plan(manifest)
            _write_missing(output / _VIDEOS, plan, num_workers, progress)
            _write_annotations(output, manifest, plan)
            (output / _UNFINISHED).rename(output / _MANIFEST)
    except OSError as error:
        if error.errno is None:  # one of ours, worded already
            raise
        remedy = {
            errno.ENOSPC: "make room there and give the same command again, which goes on",
            errno.EDQUOT: "make room in your quota and give the same command again, which goes on",
            errno.ENAMETOOLONG: "name a folder with a shorter path",
            errno.EEXIST: "it is a file; name a folder",
            errno.ENOTDIR: "it lies in a file; name another folder",
        }.get(error.errno, "name a folder that you may write to")
        raise OSError(
            error.errno, f"cannot write gestures: {error.strerror}; {remedy}", str(output)
        ) from error
    except BaseException as stop:
        if not isinstance(stop, Exception):  # a signal's
            stop.add_note(f"what is drawn stays in {output}, and the same command goes on with it")
        raise


def _manifest(classes: Sequence[str], num_clips: dict[str, int], seed: int) -> dict:
    """What the finished folder's gestures.json shall say. Raises ValueError for bad arguments."""
    for name in classes:
        if name not in CLASS_NAMES:
            nearest = difflib.get_close_matches(name, CLASS_NAMES, n=1, cutoff=0)[0]
            raise ValueError(f"unknown gesture class {name!r}; did you mean {nearest!r}?")
    if not classes:
        raise ValueError("no gesture classes; name at least one")
    for name, count in {"seed": seed, **num_clips}.items():
        if count < 0:
            raise ValueError(f"{name} must be 0 or more, not {count}")
    if not sum(num_clips.values()):
        raise ValueError("no clips: train, validation and test are all 0")
    return {
        "version": VERSION,
        "seed": seed,
        "classes": [name for name in CLASS_NAMES if name in classes],
        "num_clips": num_clips,
    }


@contextlib.contextmanager
def _sole_writer(output: Path, progress: bool):
    """Holds the folder's lock; the system drops it when this process ends, however it ends."""
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"{output}: waiting for another process that writes it", file=sys.stderr)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def _is_finished(output: Path, wanted: dict) -> bool:
    """Whether the wanted data set lies there. Raises ValueError if something else does."""
    finished = (output / _MANIFEST).exists()
    if not finished and not (output / _UNFINISHED).exists():
        foreign = sorted({path.name for path in output.iterdir()} - {f".{_UNFINISHED}.tmp"})
        if foreign:
            raise ValueError(
                f"{output} holds {foreign[0]!r} and is no folder of gestures; name a folder that "
                "is empty or does not exist (--output, or --config.dataset.data_dir)"
            )
        return False
    there = _read_json(output / (_MANIFEST if finished else _UNFINISHED))
    differing = [
        f"{key} {there[key]} (wanted: {wanted[key]})"
        for key in ("version", "seed")
        if there[key] != wanted[key]
    ]
    for what, names, others in (
        ("without", wanted["classes"], there["classes"]),
        ("with", there["classes"], wanted["classes"]),
    ):
        if missing := [name for name in names if name not in others]:
            differing.append(f"{what} {few(missing, 3)}")
    for split, count in wanted["num_clips"].items():
        is_count = there["num_clips"].get(split, 0)
        if is_count < count or (not finished and is_count != count):
            differing.append(f"{is_count} {split} clips (wanted: {count})")
    if differing:
        raise ValueError(
            f"{output} holds {'' if finished else 'the beginnings of '}other gestures: "
            f"{'; '.join(differing)}. Name another folder, or delete this one: rm -r {output}"
        )
    return finished


# ---- the command ----


def _class_list(text: str) -> list[str]:
    if text in ("all", "time"):
        return list(CLASS_NAMES if text == "all" else TIME_CLASSES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CLASS_NAMES:
            what = f"unknown gesture class {name!r}{suggest(name, ('all', 'time', *CLASS_NAMES))}"
            raise argparse.ArgumentTypeError(what)
    try:
        return _manifest(names, {"train": 1}, 0)["classes"]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, not {text!r}")
    return int(text)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m input_pipeline.gestures",
        description="Draws gesture videos in 20BN-Jester's layout.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--classes",
        type=_class_list,
        default=list(CLASS_NAMES),
        metavar="all|time|NAME,…",
        help="all 27 of Jester's (default); time: the 8 that only the order of frames tells "
        "apart; or names with commas between",
    )
    for split, count in zip(SPLITS, (24_576, 2_048, 2_048), strict=True):
        parser.add_argument(
            f"--{split}",
            type=_count,
            default=count,
            metavar="N",
            help=f"{split} clips, all classes together (default {count})",
        )
    parser.add_argument("--seed", type=_count, default=0, help="another seed, other clips")
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="processes (default: one a processor)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parsed = parser.parse_args(arguments)
    if parsed.workers == 0:
        parser.error("argument --workers: expected 1 or more")
    if not parsed.train + parsed.validation + parsed.test:
        parser.error("no clips: --train, --validation and --test are all 0")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(_command, ["gestures", *(sys.argv[1:] if arguments is None else arguments)])


def _command(argv: list[str]) -> None:
    options = _parse_arguments(argv[1:])
    output = Path(options.output).expanduser()  # shells leave a ~ after a = alone
    generate(
        output,
        classes=options.classes,
        train=options.train,
        validation=options.validation,
        test=options.test,
        seed=options.seed,
        num_workers=options.workers,
    )
    counts = read_manifest(output)["num_clips"]
    summary = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{output}: {summary} clips")


if __name__ == "__main__":
    sys.exit(main())
