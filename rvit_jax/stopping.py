"""How a signal stops a run: after a whole step, the same one in all processes."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from rvit_jax.command import Stopped


class Interrupted(Stopped):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int):
        super().__init__(signum, "the state is saved, and the same command goes on", by_all=True)


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the second one ends the process at once.

    Of several processes all are set before the same step, whichever gets the signal: JAX hears
    SIGTERM and tells the others.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._several = jax.process_count() > 1
        self._next = 0  # step to ask JAX about
        self._reason: int = signal.SIGTERM  # of a stop that JAX tells of

    def look(self, step: int) -> None:
        """Asks whether to stop before `step`; of several processes each does, at every step."""
        if not self._several:
            return
        # JAX sets the stop one step after the furthest of the processes and answers to that number
        # alone: a signal from before the first step of a resumed run would be lost.
        stops = [
            multihost_utils.reached_preemption_sync_point(number)
            for number in range(self._next, step + 1)
        ]
        self._next = step + 1
        if any(stops):
            self.signum = self._reason

    def __bool__(self) -> bool:
        return self.signum is not None

    def _handle(self, signum: int, _frame: object) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        # Not `print`, which may have been interrupted by the signal itself.
        os.write(2, b"\nstopping after this step; once more to leave at once\n")

    def _pass_on(self, signum: int, _frame: object) -> None:
        """Of several processes the others must hear of it: a Ctrl-C becomes a SIGTERM."""
        signal.signal(signum, lambda *_: os._exit(128 + signum))
        self._reason = signum
        os.write(2, b"\nall processes stop after this step; once more to leave at once\n")
        os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def listen(self) -> Iterator["StopRequest"]:
        """Takes the signals until the block is left."""
        handlers = {signal.SIGINT: self._handle, signal.SIGTERM: self._handle}
        if self._several:  # SIGTERM is JAX's
            handlers = {signal.SIGINT: self._pass_on}
        before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
