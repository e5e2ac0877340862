"""The loader section of `scripts/benchmark.py`: clips a second, from JPEG files to batches.

Ours against a PyTorch `DataLoader` that does the reference's own work, on the same folder, with as
many worker processes, taking turns in one run. The clips are made up, of 20BN-Jester's layout and
size: 100 pixels high, of differing width, about 4 kB a frame. They stay in the system's cache.

torchvision is not needed: `ReferenceClips` makes the tensor operations of its `Resize`, `ToTensor`
and `Normalize` itself. Both sides give the same pixels, which is checked before anything is timed;
theirs travel from the workers as normalised float32, ours as uint8, since our model's step
normalises on the device.
"""

import functools
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_contenders import OURS, Settings
from benchmark_report import Row
from benchmark_sections import build, contenders_row, measure, note
from ml_collections import ConfigDict
from PIL import Image

import input_pipeline
from input_pipeline.cpus import num_cpus
from input_pipeline.jester import CLASS_NAMES

THEIRS = "PyTorch DataLoader"
THEIRS_UINT8 = f"{THEIRS}, uint8"  # what the reference would gain by normalising elsewhere
OURS_FAST = f"{OURS}, fast decoder"
OURS_THREADS = f"{OURS}, threads"
BATCH_SIZE = 4
NUM_CLIPS = 128
WIDTHS = (132, 150, 176)  # pixels; the commonest of 20BN-Jester's frames
HEIGHT = 100
# Batches a worker that either side may have ready when its turn begins, at most. Grain's: two in
# the worker's queue, two behind it, one in each of the buffers between and in the making.
READ_AHEAD = 10
LEAST_PAUSE_S = 0.02


def measure_loader(config: ConfigDict, settings: Settings) -> Iterator[Row]:
    """As many worker processes as there are processors, from a folder of made-up clips.

    Raises:
        ImportError: a package that only the input pipeline needs is not installed.
        ValueError: the two sides do not give the same pixels.
    """
    from input_pipeline import loader  # noqa: F401 - Grain is missed before anything is written

    config = config.copy_and_resolve_references()
    num_clips = 2 * BATCH_SIZE if settings.quick else NUM_CLIPS
    with tempfile.TemporaryDirectory(prefix="rvit_benchmark_") as folder:
        note(f"loader: writing {num_clips} clips")
        frame_bytes = write_clips(Path(folder), num_clips, config.dataset.num_frames)
        config.dataset.update(name="jester", data_dir=folder, classes=(), cache=False)
        config.dataset.num_workers = num_cpus()
        config.batch_size = BATCH_SIZE
        yield {**loader_row(config, settings), "mean_frame_bytes": frame_bytes}


def loader_row(config: ConfigDict, settings: Settings) -> Row:
    """All contenders on the config's data.

    Seconds are those of a batch, the mean of each turn: workers finish in pairs, so that single
    calls take either no time or twice as much.
    """
    workers = config.dataset.num_workers
    skip = READ_AHEAD * workers
    calls = skip + (3 if settings.quick else 12) * workers
    differences = pixel_differences(config)
    readers = make_readers(config, calls)
    try:
        contenders = [build(name, lambda reader=reader: reader) for name, reader in readers.items()]
        for reader in readers.values():
            reader.begin(skip * max(LEAST_PAUSE_S, *(c.call_s for c in contenders)))
        what = f"loader, {workers} worker processes"
        samples = measure(contenders, settings, what, seed=config.seed, calls=calls, skip=skip)
    finally:
        for reader in readers.values():
            reader.close()
    rounds = {name: [math.fsum(s) / len(s) for s in turns] for name, turns in samples.items()}
    further = {}
    for name, seconds in rounds.items():
        rate = config.batch_size / float(np.median(seconds))
        further[name] = {"clips_per_s": rate, **differences[name]}
    return contenders_row(
        contenders,
        {},
        rounds,
        further,
        num_workers=workers,
        batch_size=config.batch_size,
        num_frames=config.dataset.num_frames,
        image_size=config.model.image_size,
    )


class Reader:
    """One contender: a call takes its next batch.

    Workers go on when a turn is over, until as many batches are ready as they may hold. So the
    first call of a turn waits until those of the turn before are at rest; and the batches that are
    ready by then have to be taken, uncounted, before the rate is that of the reading.
    """

    def __init__(self, open_batches: Callable[[], Any], calls_of_a_turn: int):
        self._open, self._batches, self._iterator = open_batches, None, None
        self._calls, self._count, self._pause_s = calls_of_a_turn, 0, 0.0

    def begin(self, pause_s: float) -> None:
        """Counts turns from here on, with so long a pause before each."""
        self._count, self._pause_s = 0, pause_s

    def __call__(self) -> Any:
        """The next batch; the first call opens the data and starts the workers."""
        if self._iterator is None:
            self._batches = self._open()
            self._iterator = iter(self._batches)
        if self._count % self._calls == 0:
            time.sleep(self._pause_s)
        self._count += 1
        return next(self._iterator)

    def close(self) -> None:
        """Ends the worker processes."""
        if hasattr(self._batches, "close"):
            self._batches.close()
        elif self._iterator is not None:
            # PyTorch's end with their iterator; left to its `__del__`, a Ctrl-C would be lost.
            self._iterator._shutdown_workers()
        self._iterator = self._batches = None


def make_readers(config: ConfigDict, calls: int) -> dict[str, Reader]:
    """Every contender, by name; none has begun to read."""
    openers: dict[str, Callable[[], Any]] = {}
    for name, keys in {
        OURS: {},
        OURS_THREADS: {"num_workers": 0},
        OURS_FAST: {"decoder": "fast"},
    }.items():
        openers[name] = functools.partial(open_ours, config, "train", **keys)
    for name, as_float in ((THEIRS, True), (THEIRS_UINT8, False)):
        openers[name] = functools.partial(open_theirs, config, as_float=as_float)
    return {name: Reader(open_batches, calls) for name, open_batches in openers.items()}


def open_ours(config: ConfigDict, split: str, **keys: Any) -> Any:
    """Our batches, with keys of `config.dataset` changed."""
    config = config.copy_and_resolve_references()
    config.dataset.update(keys)
    return input_pipeline.get_dataset(config, split)


def open_theirs(config: ConfigDict, *, as_float: bool) -> torch.utils.data.DataLoader:
    """PyTorch's batches, endless, each epoch shuffled anew."""
    clips = ReferenceClips(config, as_float=as_float)
    return torch.utils.data.DataLoader(
        clips,
        batch_sampler=EndlessBatches(len(clips), config.batch_size, config.seed),
        num_workers=config.dataset.num_workers,
        multiprocessing_context="spawn",  # as ours: JAX's threads are no friends of a fork
    )


class EndlessBatches:
    """Indices of the clips of each batch, the last partial one of an epoch dropped."""

    def __init__(self, num_clips: int, batch_size: int, seed: int):
        self._num_clips, self._batch_size, self._seed = num_clips, batch_size, seed

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            order = torch.randperm(self._num_clips, generator=generator).tolist()
            for start in range(0, self._num_clips - self._batch_size + 1, self._batch_size):
                yield order[start : start + self._batch_size]


class ReferenceClips(torch.utils.data.Dataset):
    """What the reference does to make a clip: see the input's part of its recipe.

    The first T frames, the last one repeated where there are fewer; of each, what torchvision's
    `Resize` (with Pillow's own filter), `ToTensor` and `Normalize` do. A clip is [3, T, H, W].
    """

    def __init__(self, config: ConfigDict, *, as_float: bool = True):
        """Reads the list of the training clips alone.

        Args:
            config: `dataset` and `model.image_size` are read.
            as_float: float32, normalised; False: uint8, as our batches.
        """
        split = input_pipeline.open_source(config, "train")
        self.ids = split.ids
        self._labels = split.labels.tolist()
        self._folder = split.frames_dir
        self._num_frames = config.dataset.num_frames
        self._size = (config.model.image_size,) * 2
        self._as_float = as_float

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        folder = os.path.join(self._folder, self.ids[index])
        names = sorted(os.listdir(folder))[: self._num_frames]
        frames = [self._frame(os.path.join(folder, name)) for name in names]
        frames += frames[-1:] * (self._num_frames - len(frames))
        return torch.stack(frames, dim=1), self._labels[index]

    def _frame(self, path: str) -> torch.Tensor:
        """float32 or uint8 [3, H, W]."""
        image = Image.open(path).convert("RGB").resize(self._size)
        frame = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if not self._as_float:
            return frame
        frame = frame.to(torch.float32).div(255)
        mean, std = (torch.tensor([0.5] * 3).view(-1, 1, 1) for _ in range(2))
        return frame.sub_(mean).div_(std)


def pixel_differences(config: ConfigDict) -> dict[str, dict[str, float]]:
    """By contender, how far its pixels are from ours at most and in the mean, in 0 ... 255.

    Raises:
        ValueError: PyTorch's are not ours, by the standard decoder.
    """
    clips = {}
    for name, keys in {OURS: {}, OURS_FAST: {"decoder": "fast"}}.items():
        batches = open_ours(config, "train", num_workers=0, **keys)
        batch = next(batches)
        batches.close()
        clips[name] = batch["video"].astype(np.int16)
    for name, as_float in ((THEIRS, True), (THEIRS_UINT8, False)):
        theirs = ReferenceClips(config, as_float=as_float)
        videos = [theirs[theirs.ids.index(clip_id)][0] for clip_id in batch["id"]]
        video = torch.stack(videos).permute(0, 2, 3, 4, 1).numpy()  # [B, T, H, W, 3]
        clips[name] = np.rint((video + 1) * 127.5) if as_float else video.astype(np.int16)
        if not np.array_equal(clips[name], clips[OURS]):
            raise ValueError(f"the pixels of {name} are not those of {OURS}: no fair comparison")
    clips[OURS_THREADS] = clips[OURS]
    return {name: _difference(video, clips[OURS]) for name, video in clips.items()}


def _difference(video: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    difference = np.abs(video - expected)
    return {
        "max_pixel_difference": float(difference.max()),
        "mean_pixel_difference": float(difference.mean()),
    }


def write_clips(root: Path, num_clips: int, num_frames: int) -> float:
    """Makes a training split in 20BN-Jester's layout; returns a frame's bytes, in the mean."""
    num_bytes = 0
    for number in range(num_clips):
        folder = root / "20bn-jester-v1" / str(number + 1)
        folder.mkdir(parents=True)
        width = WIDTHS[number % len(WIDTHS)]
        for t, frame in enumerate(make_frames(number, num_frames, width), 1):
            num_bytes += (folder / f"{t:05d}.jpg").write_bytes(frame)
    labels = root / "annotations"
    labels.mkdir()
    lines = [f"{n + 1};{CLASS_NAMES[n % len(CLASS_NAMES)]}\n" for n in range(num_clips)]
    (labels / "jester-v1-train.csv").write_text("".join(lines))
    return num_bytes / (num_clips * num_frames)


def make_frames(seed: int, num_frames: int, width: int) -> Sequence[bytes]:
    """A made-up clip's JPEG files: a window that wanders over soft shapes with a camera's grain."""
    random = np.random.default_rng(seed)
    size = (2 * width, 2 * HEIGHT)
    shapes = Image.fromarray(random.integers(0, 256, (40, 70, 3), np.uint8))
    scene = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    frames = []
    for t in range(num_frames):
        x = round((0.5 + 0.5 * math.sin(t / 9)) * width)
        y = round((0.5 + 0.5 * math.cos(t / 7)) * HEIGHT)
        window = scene[y : y + HEIGHT, x : x + width]
        noisy = window + random.normal(0, 4, window.shape)
        file = io.BytesIO()
        pixels = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=50)
        frames.append(file.getvalue())
    return frames
