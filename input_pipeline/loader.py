"""Order, reading, batches, padding, worker processes and the resumable position."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from input_pipeline import jester, sampling, transforms
from input_pipeline.cpus import num_cpus

Clip = dict[str, Any]
Batch = dict[str, np.ndarray]

PADDING = -1  # in place of a clip, on the rows that fill up an epoch's last batch
FRAME_PACKINGS = ("rgb", "channel_planes")

_MOST_THREADS = 16
_WORKER_BUFFER = 2  # batches that each worker process keeps ready
_PARENT_CHECK_S = 0.5


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """What makes a clip of a video; each attribute is the config key of the same name."""

    image_size: int
    num_frames: int
    frame_stride: int = 1
    short_clips: str = "repeat_last"
    frame_packing: str = "rgb"
    frame_order: str = "forward"
    seed: int = 0

    @classmethod
    def from_config(cls, config: ConfigDict) -> ClipOptions:
        """Takes the options from a whole config."""
        dataset = config.dataset
        return cls(
            image_size=config.model.image_size,
            num_frames=dataset.num_frames,
            frame_stride=dataset.frame_stride,
            short_clips=dataset.short_clips,
            frame_packing=dataset.frame_packing,
            frame_order=dataset.frame_order,
            seed=config.seed,
        )

    def __post_init__(self):
        """Refuses values that cannot be, and two that cannot go together."""
        for key, choices in (
            ("short_clips", sampling.SHORT_CLIPS),
            ("frame_packing", FRAME_PACKINGS),
            ("frame_order", sampling.FRAME_ORDERS),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"dataset.{key} is {getattr(self, key)!r}; choose one of: {', '.join(choices)}"
                )
        if self.frame_packing == "channel_planes" and self.short_clips == "ragged":
            raise ValueError(
                "dataset.frame_packing=channel_planes mixes the planes of all T frames, so every "
                "clip must have T: set dataset.short_clips=repeat_last"
            )


class ClipReader:
    """Reads a clip by its index in the split: files -> uint8 [T, H, W, 3].

    With `cache`, a clip's pixels stay in memory after its first reading. Threads may share one.
    """

    def __init__(self, split: jester.Split, options: ClipOptions, *, cache: bool = False):
        """Reads nothing yet."""
        self._split = split
        self._options = options
        self._cache: dict[int, tuple[np.ndarray, int]] | None = {} if cache else None
        self._locks: dict[int, threading.Lock] = {}
        size = options.image_size
        self._no_video = np.zeros((options.num_frames, size, size, 3), np.uint8)

    def __call__(self, index: int) -> Clip:
        """Returns the clip `index`, or for `PADDING` a row of zeros with `mask` False."""
        if index == PADDING:
            return {
                "video": self._no_video,
                "label": -1,
                "num_frames": 1,
                "mask": False,
                "id": "",
            }
        video, num_frames = self._video(index)
        labels = self._split.labels
        return {
            "video": video,
            "label": -1 if labels is None else labels[index],
            "num_frames": num_frames,
            "mask": True,
            "id": self._split.ids[index],
        }

    def _video(self, index: int) -> tuple[np.ndarray, int]:
        if self._cache is None:
            return self._read(self._split.ids[index])
        # One lock a clip: reading ahead into the next epoch may ask for a clip in the making.
        with self._locks.setdefault(index, threading.Lock()):
            if index not in self._cache:
                self._cache[index] = self._read(self._split.ids[index])
            return self._cache[index]

    def _read(self, clip_id: str) -> tuple[np.ndarray, int]:
        """Decodes a clip; returns the video and its number of real frames."""
        try:
            return self._decode(clip_id)
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:
            # Above all a StopIteration, which Grain would take for the end of the data, and
            # anything that could not travel from a worker process to this one.
            raise RuntimeError(
                f"reading the clip {clip_id!r} in {self._split.frames_dir} failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _decode(self, clip_id: str) -> tuple[np.ndarray, int]:
        options = self._options
        files = jester.frame_files(os.path.join(self._split.frames_dir, clip_id))
        indices = sampling.order_frames(
            sampling.head_indices(len(files), options.num_frames, options.frame_stride),
            options.frame_order,
            seed=options.seed,
            clip_id=clip_id,
        )
        if options.short_clips == "repeat_last":
            indices = sampling.repeat_last(indices, options.num_frames)
        video = np.empty_like(self._no_video)
        first_row: dict[int, int] = {}  # of a frame: each is decoded once
        for row, frame in enumerate(indices.tolist()):
            if frame in first_row:
                video[row] = video[first_row[frame]]
            else:
                video[row] = transforms.resize_frame(files[frame], options.image_size)
                first_row[frame] = row
        video[len(indices) :] = 0
        if options.frame_packing == "channel_planes":
            video = transforms.pack_channel_planes(video)
        return video, len(indices)


class ClipOrder:
    """One process's rows, one after the other: row number -> index of a clip, or `PADDING`.

    An epoch is ceil(num_clips / B) global batches of B rows, the last one filled up with padding
    (Deviation: the reference drops the clips of a last partial batch);
    process p of P holds rows [p * B/P, (p + 1) * B/P) of each. So the order of the global batches
    depends on the seed, the number of clips and B, and on nothing else.
    """

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        *,
        shuffle_seed: int | None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """With a seed the order is shuffled anew each epoch, for ever; without, one ordered pass.

        Raises:
            ValueError: `process_count` does not divide `batch_size`, or there is no such process.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it counts from 1")
        if batch_size % process_count:
            raise ValueError(
                f"batch_size {batch_size} does not divide among {process_count} processes: "
                f"make it a multiple of {process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index}; expected 0...{process_count - 1}")
        self.rows = batch_size // process_count
        self.batches_per_epoch = -(-num_clips // batch_size)
        self._num_clips = num_clips
        self._batch_size = batch_size
        self._first_row = process_index * self.rows
        self._shuffle_seed = shuffle_seed

    def __len__(self) -> int:
        """Rows in all; "for ever" stops short of where Grain's float arithmetic gets coarse."""
        epoch = self.batches_per_epoch * self.rows
        return epoch if self._shuffle_seed is None else 2**52 // epoch * epoch

    def __getitem__(self, row: int) -> int:
        """Returns the index of the clip on this process's row `row`, or `PADDING`."""
        batch, row_in_batch = divmod(row, self.rows)
        epoch, batch_in_epoch = divmod(batch, self.batches_per_epoch)
        place = batch_in_epoch * self._batch_size + self._first_row + row_in_batch
        if place >= self._num_clips:
            return PADDING
        if self._shuffle_seed is None:
            return place
        return int(_permutation(self._shuffle_seed, epoch, self._num_clips)[place])


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_clips: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_clips)


def stack_clips(clips: Sequence[Clip]) -> Batch:
    """Makes a batch of clips, copying each video once."""
    return {
        "video": np.stack([clip["video"] for clip in clips]),
        "label": np.array([clip["label"] for clip in clips], np.int32),
        "num_frames": np.array([clip["num_frames"] for clip in clips], np.int32),
        "mask": np.array([clip["mask"] for clip in clips], np.bool_),
        "id": np.array([clip["id"] for clip in clips], np.str_),
    }


class BatchIterator(Iterator[Batch]):
    """Batches of one split, with a position that can be saved and restored exactly.

    A batch holds this process's rows of a global batch: `video` uint8 [B, T, H, W, 3], `label`
    int32 [B], `num_frames` int32 [B], `mask` bool [B], `id` str [B]. Rows that fill up an epoch's
    last batch have mask False, video 0, label -1, num_frames 1 and id "". A clip shorter than T
    under `short_clips="ragged"` is 0 from frame `num_frames` on.

    An error in reading is raised by the batch that it belongs to and by every call after it, until
    `set_state` or `rewind`. Use from one thread.

    Attributes:
        split: "train", "validation" or "test".
        num_clips: clips of one epoch, over all processes.
        class_names: in index order.
        has_labels: False where the CSV gives ids only.
        steps_per_epoch: global batches that cover every clip once.
    """

    def __init__(
        self,
        split: jester.Split,
        options: ClipOptions,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        cache: bool = False,
    ):
        """Reads nothing yet; threads or worker processes start with the first batch.

        Args:
            split: the clips; "train" is endless and shuffled by `options.seed`, others one pass.
            options: what makes a clip.
            batch_size: B of the global batch.
            process_index: which process this is.
            process_count: P; divides B.
            num_workers: worker processes that read, or 0 for threads of this one.
            cache: keep decoded clips in memory; threads only.

        Raises:
            ValueError: the arguments do not fit together.
        """
        if num_workers < 0:
            raise ValueError(f"dataset.num_workers is {num_workers}; expected 0 or more")
        if cache and num_workers:
            raise ValueError(
                f"dataset.cache keeps clips in this process, but dataset.num_workers={num_workers} "
                "reads them in others: set dataset.num_workers=0 or dataset.cache=False"
            )
        self.split = split.name
        self.num_clips = len(split.ids)
        self.class_names = split.class_names
        self.has_labels = split.labels is not None
        self._order = ClipOrder(
            self.num_clips,
            batch_size,
            shuffle_seed=options.seed if split.name == "train" else None,
            process_index=process_index,
            process_count=process_count,
        )
        self.steps_per_epoch = self._order.batches_per_epoch
        self._reader = ClipReader(split, options, cache=cache)
        self._num_workers = num_workers
        self._fingerprint = _fingerprint(split, batch_size, options.seed)
        self._position = 0  # batches handed out since the start of the first epoch
        self._batches: grain.DatasetIterator | None = None
        self._error: Exception | None = None
        self._closed = False

    def __iter__(self) -> BatchIterator:
        """Returns itself: it goes on from where it stands."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            StopIteration: the one pass over a split other than train is over.
            ValueError: a frame cannot be read, or the iterator is closed.
            FileNotFoundError: a clip's folder is gone or empty.
            RuntimeError: anything else that went wrong in reading; a worker process that died.
        """
        if self._closed:
            raise ValueError(f"the {self.split} data is closed: call get_dataset again")
        if self._error is not None:
            raise self._error
        if self._position * self._order.rows == len(self._order):
            self._stop()
            raise StopIteration
        try:
            if self._batches is None:
                self._batches = self._start()
                _reading.add(self)
            batch = next(self._batches)
        except BaseException as error:
            # Part of a batch may be gone from Grain's iterator: the next one starts afresh.
            self._stop()
            if isinstance(error, StopIteration):
                error = RuntimeError(f"the {self.split} data ended at batch {self._position}")
            elif isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
                error = RuntimeError(
                    f"a worker process reading the {self.split} data died: {error} Exit code -9 "
                    "hints at too little memory, -7 at a full /dev/shm: set dataset.num_workers "
                    "lower, or to 0 for threads"
                )
            if isinstance(error, Exception):
                self._error = error
            raise error
        self._position += 1
        if self._position * self._order.rows == len(self._order):
            self._stop()  # a finished pass holds no threads or processes
        return {key: np.asarray(value) for key, value in batch.items()}

    def get_state(self) -> dict[str, Any]:
        """Returns the position, as JSON can hold it: the same for any number of processes.

        It counts the batches handed out, not those read ahead. With it goes what the order of the
        clips depends on.
        """
        return {"position": self._position, **self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position of `get_state`, after any number of processes or workers.

        Raises:
            ValueError: the state is none of `get_state`, or of other data or another order.
        """
        position = state.get("position") if isinstance(state, dict) else None
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"no position of the data: {state!r}; expected one of get_state()")
        differing = [
            f"{key} is {_short(value)} here and {_short(state.get(key))} in the saved position"
            for key, value in self._fingerprint.items()
            if state.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"the saved position belongs to other {self.split} data: {'; '.join(differing)}; "
                "restore the data and the config, or start in a new workdir"
            )
        if position * self._order.rows > len(self._order):
            raise ValueError(
                f"the saved position {position} lies past the end of the {self.split} data: "
                f"{self.steps_per_epoch} batches"
            )
        self._stop()
        self._position = position
        self._error = None

    def rewind(self) -> None:
        """Goes back to the start, for another pass; cached clips stay in memory."""
        self.set_state({"position": 0, **self._fingerprint})

    def close(self) -> None:
        """Ends the threads or worker processes and frees the cache; may be called again."""
        self._closed = True
        self._stop()
        self._reader = None

    def _start(self) -> grain.DatasetIterator:
        """Builds the reading of everything from the current position on."""
        rows = self._order.rows
        order = grain.MapDataset.source(self._order)[self._position * rows :]
        clips = order.map(self._reader)
        if not self._num_workers:
            # Threads share the clips of one batch: the first batch is soon there.
            threads = min(_MOST_THREADS, num_cpus())
            read_options = grain.ReadOptions(
                num_threads=threads, prefetch_buffer_size=max(2 * rows, threads)
            )
            return iter(clips.to_iter_dataset(read_options).batch(rows, batch_fn=stack_clips))
        if not flags.FLAGS.is_parsed():  # outside absl's app.run; Grain reads its own flags here
            flags.FLAGS.mark_as_parsed()
        # Each worker makes whole batches, every num_workers-th one: so their order stays.
        batches = clips.batch(rows, batch_fn=stack_clips)
        read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        return iter(
            batches.to_iter_dataset(read_options).mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=_WORKER_BUFFER
                ),
                worker_init_fn=functools.partial(_end_with_parent, os.getpid()),
            )
        )

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            _reading.discard(self)


# Leaving Python while worker processes are at work would end in pages of Grain's tracebacks.
_reading: weakref.WeakSet[BatchIterator] = weakref.WeakSet()


@atexit.register
def _stop_reading() -> None:
    for batches in list(_reading):
        batches._stop()


def _end_with_parent(parent: int, worker_index: int, worker_count: int) -> None:
    """Ends this worker process soon after its parent, which may be killed without a word.

    Linux's PR_SET_PDEATHSIG will not do: it fires when the *thread* ends that started the worker,
    and Grain starts workers from threads that it ends before them.
    """
    del worker_index, worker_count
    # A terminal's Ctrl-C and a cluster's SIGTERM go to all processes; what they mean, the parent
    # decides. Grain ends its workers by other means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _fingerprint(split: jester.Split, batch_size: int, seed: int) -> dict[str, Any]:
    """Returns what the order of the clips and their labels depends on, as JSON can hold it."""
    labels = [] if split.labels is None else split.labels.tolist()
    return {
        "split": split.name,
        "seed": seed,
        "batch_size": batch_size,
        "num_clips": len(split.ids),
        "class_names": list(split.class_names),
        "ids_sha256": _sha256("\n".join(split.ids)),
        "labels_sha256": _sha256(",".join(map(str, labels))),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
