"""Which clip lies on which row of which batch: shuffled, in length buckets, sliced by process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_KEPT_EPOCHS = 4  # reading ahead reaches into the next one


class Place(NamedTuple):
    """What one row of a batch is made of.

    Attributes:
        index: of the clip in its source; -1 on the rows that fill up an epoch's last batch.
        epoch: from 0.
        num_frames: T of the batch; 0: the config's.
    """

    index: int  # type: ignore[assignment]  # hides tuple's own, which nobody calls
    epoch: int
    num_frames: int = 0


class ClipOrder:
    """One process's rows, one after the other: row number -> `Place`.

    An epoch is ceil(num_clips / B) global batches of B rows, the last one filled up with padding
    (Deviation: the reference drops the clips of a last partial batch); process p of P holds rows
    [p * B/P, (p + 1) * B/P) of each. So the order of the global batches depends on the seed, the
    clips' lengths if they are given, their number and B, and on nothing else: processes need not
    tell each other anything.

    With lengths, an epoch's shuffled clips are sorted by length, clips of one length staying in
    their random order, cut in batches, and the batches shuffled: each is as long as its longest
    clip and all but a few hold clips of one length.
    """

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        *,
        shuffle_seed: int | None,
        lengths: np.ndarray | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """With a seed the order is shuffled anew each epoch, for ever; without, one ordered pass.

        Args:
            num_clips: of an epoch.
            batch_size: B of the global batch.
            shuffle_seed: from 0; None: in order.
            lengths: frames that each clip takes in a batch, from 1, int [num_clips]; only together
                with a seed. None: one length for all.
            process_index: which process this is.
            process_count: P.

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
        self._lengths = lengths
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Rows in all; "for ever" stops short of where Grain's float arithmetic gets coarse."""
        epoch = self.batches_per_epoch * self.rows
        return epoch if self._shuffle_seed is None else 2**52 // epoch * epoch

    def __getitem__(self, row: int) -> Place:
        """What lies on this process's row `row`."""
        batch, row_in_batch = divmod(row, self.rows)
        epoch, batch_in_epoch = divmod(batch, self.batches_per_epoch)
        clips = self._epoch(epoch)[batch_in_epoch]
        num_frames = 0
        if self._lengths is not None:
            num_frames = int(self._lengths[clips[clips >= 0]].max())
        return Place(int(clips[self._first_row + row_in_batch]), epoch, num_frames)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The clips of each global batch, int [batches, B], -1 for padding."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:  # threads may do so at once
                self._epochs.pop(min(self._epochs, default=epoch), None)
            self._epochs[epoch] = self._shuffled(epoch)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = np.full(self.batches_per_epoch * self._batch_size, -1)
        order[: self._num_clips] = np.arange(self._num_clips)
        if self._shuffle_seed is None:
            return order.reshape(-1, self._batch_size)
        random = np.random.default_rng([self._shuffle_seed, epoch])
        clips = random.permutation(self._num_clips)
        if self._lengths is not None:
            clips = clips[np.argsort(self._lengths[clips], kind="stable")]
        order[: self._num_clips] = clips
        batches = order.reshape(-1, self._batch_size)
        return batches if self._lengths is None else random.permutation(batches)
