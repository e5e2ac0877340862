"""Worker processes that are watched: one that ends or hangs is an error, not a wait for ever."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

_LOOK_S = 1.0  # between two looks at the workers, while a batch is waited for
_LET_GO_S = 3.0  # that a read has to end in once its workers have
_PARENT_CHECK_S = 0.5


def end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent, which may be killed without a word.

    Linux's PR_SET_PDEATHSIG will not do: it fires when the *thread* ends that started the process,
    and Grain starts workers from threads that it ends before them.

    Args:
        parent: its process number.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


class WorkerError(RuntimeError):
    """A worker process ended, or gave no batch in time."""


class WatchedBatches(Iterator[Any]):
    """Batches that worker processes of Grain make.

    Grain notices a worker that a signal ended. For one that exits with 0, or stands still, it
    waits for ever.
    """

    def __init__(self, batches: Any, *, timeout_s: float, endless: bool):
        """Reads nothing yet.

        Args:
            batches: Grain's iterator; its worker processes start with the first batch.
            timeout_s: seconds that a batch may take; 0: no limit. Time in which this process
                itself is stopped (Ctrl-Z) does not count.
            endless: no worker is ever done, so that one that exits has failed. Of one pass a
                worker ends, with exit code 0, before the others.
        """
        self._batches, self._timeout_s, self._endless = batches, timeout_s, endless
        self._others = set(multiprocessing.active_children())
        self._workers: set[multiprocessing.process.BaseProcess] = set()
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="watched-batches", daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        """Returns the next batch.

        Raises:
            WorkerError: a worker ended, or the batch took longer than `timeout_s`. The workers are
                ended then.
        """
        self._wanted.put(True)
        waited = 0.0
        while True:
            try:
                batch, error = self._given.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                waited += _LOOK_S
                self._look(waited)
        if error is not None:
            raise error
        self._note_workers()
        return batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._wanted.put(False)
        self._thread.join(0.0 if self._thread is threading.current_thread() else _LET_GO_S)
        self._batches.close()

    def _read(self) -> None:
        given: tuple[Any, BaseException | None]
        while self._wanted.get():
            try:
                given = next(self._batches), None
            except BaseException as error:  # raised again by `__next__`
                given = None, error
            self._given.put(given)

    def _note_workers(self) -> None:
        self._workers |= set(multiprocessing.active_children()) - self._others

    def _look(self, waited: float) -> None:
        """Raises WorkerError where waiting on is of no use."""
        self._note_workers()
        ended = {worker.pid: worker.exitcode for worker in self._workers if not worker.is_alive()}
        # Those that ended with another code Grain reports, with what they had to say.
        if self._endless and 0 in ended.values():
            pid = next(pid for pid, code in ended.items() if code == 0)
            self._give_up(f"worker process {pid} ended by itself, with exit code 0.")
        if self._timeout_s and waited >= self._timeout_s:
            self._give_up(
                f"no batch in {waited:.0f} s; {len(self._workers) - len(ended)} of "
                f"{len(self._workers)} worker processes are alive."
            )

    def _give_up(self, why: str) -> None:
        for worker in self._workers:
            if worker.exitcode == 0:
                # Grain's threads wait for it without end, and closing Grain's iterator for them.
                # With another exit code they give up.
                worker._popen.returncode = 1  # type: ignore[attr-defined]  # is private
            worker.kill()  # they do not listen to gentler signals
        raise WorkerError(why)
