"""Commands of this room: as any (`input_pipeline.command_line`), and of several processes too."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from input_pipeline import command_line
from input_pipeline.command_line import ArgumentError, Stopped, parse
from rvit_jax import distributed

__all__ = ["ArgumentError", "Stopped", "parse", "run", "start"]


def run(work: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Does the work and returns the exit status; what goes wrong becomes one line on stderr."""
    return command_line.run(work, argv, explain=distributed.explain, who=distributed.who)


def start(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as the whole process, and ends it with the status that `main` returns."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise Stopped(signum)

    signal.signal(signal.SIGTERM, stop)
    status = main()
    if status >= 128 or distributed.is_started():
        # Libraries that were cut off amid their work may crash the interpreter on its way out; and
        # of several processes one that failed would wait for the others.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
