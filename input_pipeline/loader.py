"""Batches, worker processes and the resumable position."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from input_pipeline.clips import Clip, ClipOptions, ClipReader
from input_pipeline.cpus import num_cpus
from input_pipeline.order import ClipOrder
from input_pipeline.source import Source, VideoInfo
from input_pipeline.watch import WatchedBatches, WorkerError, end_with_parent

Batch = dict[str, np.ndarray]
_MOST_THREADS = 16
_WORKER_BUFFER = 2  # batches that each worker process keeps ready
_OPTIONAL_KEYS = ("lengths_sha256",)  # of a position; both must have it, or neither
_SAMPLED_CLIPS = 32  # whose pictures stand for those of the whole split


def stack_clips(clips: Sequence[Clip], *, with_frame_indices: bool = False) -> Batch:
    """Makes a batch of clips, copying each video once."""
    label = np.array([clip["label"] for clip in clips])
    batch = {
        "video": np.stack([clip["video"] for clip in clips]),
        "label": label.astype(np.int32 if label.ndim == 1 else np.float32),
        "num_frames": np.array([clip["num_frames"] for clip in clips], np.int32),
        "mask": np.array([clip["mask"] for clip in clips], np.bool_),
        "id": np.array([clip["id"] for clip in clips], np.str_),
    }
    if with_frame_indices:
        batch["frame_indices"] = np.stack([clip["frame_indices"] for clip in clips])
    return batch


class BatchIterator(Iterator[Batch]):
    """Batches of one split, with a position that can be saved and restored exactly.

    A batch holds this process's rows of a global batch: `video` uint8 [B, T, H, W, 3], `label`
    int32 [B] (of several labels per clip float32 [B, K]), `num_frames` int32 [B], `mask` bool [B],
    `id` str [B], and on request `frame_indices` int32 [B, T], -1 from `num_frames` on. With V > 1
    views of each clip: `video` [B, V, T, H, W, 3], `num_frames` [B, V], `frame_indices` [B, V, T].
    Rows that fill up an epoch's last batch have mask False, video 0, label -1, num_frames 1 and
    id ""; a clip that could not be read, under `on_error="skip"`, has the same and its id. A clip
    shorter than T under `short_clips="ragged"` is 0 from frame `num_frames` on. T is the config's,
    or in training with `length_buckets` the one of them that holds all clips of the global batch.

    An error in reading is raised by the batch that it belongs to and by every call after it, until
    `set_state` or `rewind`. Use from one thread.

    Attributes:
        split: "train", "validation" or "test".
        num_clips: clips of one epoch, over all processes.
        num_missing: clips that the lists name and that are not there, which were left out.
        class_names: in index order.
        has_labels: False where the data gives ids only.
        multi_label: a clip may have several labels.
        steps_per_epoch: global batches that cover every clip once.
    """

    def __init__(
        self,
        source: Source,
        options: ClipOptions,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        timeout_s: float = 0.0,
        cache: bool = False,
        with_frame_indices: bool = False,
    ):
        """Reads no picture yet; threads or worker processes start with the first batch.

        With `length_buckets`, training clips are asked for their numbers of frames: for a moment
        (folders), or as long as it takes to open every video or record once.

        Args:
            source: the clips; endless and shuffled by `options.seed` if `options.training`, else
                one pass.
            options: what makes a clip.
            batch_size: B of the global batch.
            process_index: which process this is.
            process_count: P; divides B.
            num_workers: worker processes that read, or 0 for threads of this one.
            timeout_s: seconds that worker processes may take for a batch; 0: no limit.
            cache: keep decoded clips in memory; threads only.
            with_frame_indices: batches say which frames of the source their clips are.

        Raises:
            ValueError: the arguments do not fit together, or with `length_buckets` a clip cannot be
                read.
            FileNotFoundError: with `length_buckets`, a clip is gone.
        """
        if num_workers < 0:
            raise ValueError(f"dataset.num_workers is {num_workers}; expected 0 or more")
        if cache and num_workers:
            raise ValueError(
                f"dataset.cache keeps clips in this process, but dataset.num_workers={num_workers} "
                "reads them in others: set dataset.num_workers=0 or dataset.cache=False"
            )
        self.split = source.name
        self.num_clips = len(source.ids)
        self.num_missing = source.num_missing
        self.class_names = source.class_names
        self.has_labels = source.labels is not None
        self.multi_label = source.labels is not None and source.labels.ndim == 2
        reader = ClipReader(source, options, cache=cache)
        self._reader: ClipReader | None = reader
        lengths = reader.lengths() if options.length_buckets else None
        self._order = ClipOrder(
            self.num_clips,
            batch_size,
            shuffle_seed=options.seed if options.training else None,
            lengths=lengths,
            process_index=process_index,
            process_count=process_count,
        )
        self.steps_per_epoch = self._order.batches_per_epoch
        self._stack = functools.partial(stack_clips, with_frame_indices=with_frame_indices)
        self._num_workers = num_workers
        self._timeout_s, self._endless = timeout_s, options.training
        self._source = source
        self._fingerprint = _fingerprint(source, batch_size, options.seed, lengths)
        self._pictures: dict[str, str] | None = None
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
            StopIteration: the one pass of a split that is not trained on is over.
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
            elif isinstance(error, WorkerError) and "no batch in" in str(error):
                error = RuntimeError(
                    f"the worker processes reading the {self.split} data hang: {error} See that "
                    "the disk answers, or set dataset.timeout_s higher (0: no limit)"
                )
            elif isinstance(error, WorkerError) or (
                isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error)
            ):
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
        return {"position": self._position, **self._fingerprint, "pictures": self._look_at_some()}

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
            for key, value in {**dict.fromkeys(_OPTIONAL_KEYS), **self._fingerprint}.items()
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
        self._check_pictures(state.get("pictures", {}))
        self._stop()
        self._position = position
        self._error = None

    def _look_at_some(self) -> dict[str, str]:
        """The checksums of the first frames of a few clips, spread over the split, by their ids.

        A clip that cannot be read has none, so that it may be mended.
        """
        if self._pictures is None:
            rows = np.linspace(0, self.num_clips - 1, min(_SAMPLED_CLIPS, self.num_clips))
            found = (
                (self._source.ids[row], _picture(self._source, row)) for row in rows.astype(int)
            )
            self._pictures = {clip_id: checksum for clip_id, checksum in found if checksum}
        return self._pictures

    def _check_pictures(self, saved: dict[str, str]) -> None:
        """Raises ValueError where clips have other pictures than when a position was saved."""
        here = self._look_at_some() if saved else {}
        other = [name for name in saved if name in here and saved[name] != here[name]]
        if other:
            raise ValueError(
                f"the {self.split} data has changed since the position was saved: the pictures of "
                f"{len(other)} of {len(saved)} sampled clips, {other[0]!r} among them, are others, "
                "or another version of Pillow or PyAV reads them otherwise; restore what was, or "
                "start in a new workdir (config.init_from takes the weights along)"
            )

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
            return iter(clips.to_iter_dataset(read_options).batch(rows, batch_fn=self._stack))
        if not flags.FLAGS.is_parsed():  # outside absl's app.run; Grain reads its own flags here
            flags.FLAGS.mark_as_parsed()
        _had_workers.set()
        # Each worker makes whole batches, every num_workers-th one: so their order stays.
        batches = clips.batch(rows, batch_fn=self._stack)
        read_options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = batches.to_iter_dataset(read_options).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=self._num_workers, per_worker_buffer_size=_WORKER_BUFFER
            ),
            worker_init_fn=functools.partial(_begin_work, os.getpid()),
        )
        return WatchedBatches(iter(workers), timeout_s=self._timeout_s, endless=self._endless)

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            _reading.discard(self)


# Leaving Python while worker processes are at work would end in pages of Grain's tracebacks.
_reading: weakref.WeakSet[BatchIterator] = weakref.WeakSet()
_had_workers = threading.Event()


@atexit.register
def _stop_reading() -> None:
    for batches in list(_reading):
        batches._stop()
    if not _had_workers.is_set():
        return
    # What workers had read ahead is shared memory, held in cycles, and a thread of Grain's frees it
    # one by one. Left to the end, Python's resource tracker would call it leaked.
    gc.collect()
    freeing = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
    if freeing is not None:
        freeing.apply(int)  # its turn comes after all that waits


def _begin_work(parent: int, worker_index: int, worker_count: int) -> None:
    """In a worker process, before it reads: it ends with its parent, and not by itself."""
    del worker_index, worker_count
    # A terminal's Ctrl-C and a cluster's SIGTERM go to all processes; what they mean, the parent
    # decides. Grain ends its workers by other means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(parent)


def _fingerprint(
    source: Source, batch_size: int, seed: int, lengths: np.ndarray | None
) -> dict[str, Any]:
    """Returns what the order of the clips and their labels depends on, as JSON can hold it."""
    labels = [] if source.labels is None else source.labels.tolist()
    found = {
        "split": source.name,
        "seed": seed,
        "batch_size": batch_size,
        "num_clips": len(source.ids),
        "class_names": list(source.class_names),
        "ids_sha256": _sha256("\n".join(source.ids)),
        "labels_sha256": _sha256(",".join(map(str, labels))),
    }
    if lengths is not None:
        found["lengths_sha256"] = _sha256(",".join(map(str, lengths.tolist())))
    return found


def _picture(source: Source, row: int) -> str:
    """The checksum of a clip's first frame and of how many there are; "" if it cannot be read."""
    told: list[VideoInfo] = []

    def first(info: VideoInfo) -> np.ndarray:
        told.append(info)
        return np.zeros(1, np.int64)

    try:
        frame = source.read(int(row), first)[0]
    except Exception:  # the batch that it belongs to says so
        return ""
    content = hashlib.sha256(f"{told[0].num_frames} {frame.shape}".encode())
    content.update(np.ascontiguousarray(frame).tobytes())
    return content.hexdigest()[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
