"""Files that are whole or not there, and folders that one process at a time works in."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write to; what was written gets its name at the end, or goes.

    It is on the disk before it has its name: a power cut leaves the old file or the new one.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    aside = path.with_name(f".tmp.{path.name}")
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a disk that went read-only; the first error counts
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_be_written(path, error) from error
        raise


@contextlib.contextmanager
def folder_written_aside(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """`written_aside` of a folder, which must be new or empty, or with `replace` may be there.

    Gives a new folder beside it, which takes its place at the end, or goes with the parents that
    were made for it.

    Raises:
        OSError: it cannot be written, or is there and not empty; the message names `folder`.
    """
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of machines that share a disk, several may have a process of one number.
    own = f".{folder.name}.{secrets.token_hex(4)}"
    aside, old = folder.with_name(f"{own}.tmp"), folder.with_name(f"{own}.old")
    try:
        aside.mkdir()
        yield aside
        flush_tree(aside)
        if replace and folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        if isinstance(error, OSError) and _is_systems(error, aside):
            raise cannot_be_written(folder, error) from error
        raise


def _is_systems(error: OSError, aside: Path) -> bool:
    """Whether an error is the system's own, of `aside` or of no file that it names."""
    of_it = error.filename is None or str(error.filename).startswith(os.fspath(aside))
    return error.errno is not None and of_it


def write_json(path: Path, content: Any) -> None:
    """Writes JSON aside, then renames: the file is never seen half written.

    Raises:
        OSError: it cannot be written; the message names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def cannot_be_written(path: Path, error: OSError) -> OSError:
    """The error with the path's name, and what helps."""
    remedy = ": make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return OSError(f"{path} cannot be written: {error.strerror or error}{remedy}")


def flush(path: Path) -> None:
    """Returns when what a file or folder holds is on the disk.

    Raises:
        OSError: it cannot be read or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders, on some file systems
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """`flush` of everything in a folder, and of itself; what vanishes meanwhile is left out."""
    for root, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(root) / name for name in names), Path(root)):
            with contextlib.suppress(FileNotFoundError):
                flush(path)


@contextlib.contextmanager
def exclusively(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder for this process: a second one is refused until the block is left.

    The system releases it when the process ends, however that happens. Readers are not kept out.

    Args:
        folder: it must be there; a file `.lock` in it says who holds it.
        what: what is done in it ("is trained in"), for the message.

    Raises:
        BlockingIOError: another process holds it; the message says which.
        OSError: it cannot be written.
    """
    path = folder / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # children do not inherit it
    except OSError as error:
        raise cannot_be_written(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(_held_by(path, folder, what)) from error
        except OSError as error:
            logging.warning(
                "%s cannot be locked (%s): make sure that no other process works in it",
                folder,
                error.strerror,
            )
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError as error:
            raise cannot_be_written(path, error) from error
        yield
    finally:
        os.close(descriptor)


def _held_by(path: Path, folder: Path, what: str) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        who = "another process"
    return f"{folder} {what} by {who}: wait for it, stop it, or choose another folder"
