"""How many processors there are for us, and all of them at work."""

from __future__ import annotations

import concurrent.futures
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")
_AT_ONCE = 1024  # results that wait for their turn


def num_cpus() -> int:
    """The processors that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(
    function: Callable[[int], _T], count: int, *, progress: str | None, delay_s: float = 0.0
) -> Iterator[_T]:
    """Calls `function` with 0, 1, ... `count` - 1 in threads; gives what it returns, in order.

    Args:
        function: what to do; what it raises comes out in its turn.
        count: of calls.
        progress: what a bar on stderr says; None: no bar.
        delay_s: seconds before the bar appears.
    """
    from tqdm import tqdm

    bar = tqdm(
        total=count,
        desc=progress,
        unit="clip",
        delay=delay_s,
        disable=progress is None,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    with bar, concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
        for start in range(0, count, _AT_ONCE):
            for result in pool.map(function, range(start, min(start + _AT_ONCE, count))):
                bar.update()
                yield result
