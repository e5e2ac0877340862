"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what was written gets its name at the end, or goes.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    aside = path.with_name(f".tmp.{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written: {error.strerror}") from error
        raise
