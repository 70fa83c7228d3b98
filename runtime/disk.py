"""What is asked of the disk beyond reading and writing: that content is on it, and that one process at a time changes a
folder."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .errors import PackageError

__all__ = ["locked", "sync", "sync_tree"]


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk. Raises OSError where it cannot."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flushes all that is in a folder, and the folder: a rename must not outlive its content."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def locked(folder: Path, *, busy: str | None = None) -> Generator[None]:
    """Holds the lock of a folder, which ends with the process, however it ends.

    Where another process has it: waits, or raises PackageError that says `busy`. Raises OSError where the folder cannot
    be opened.
    """
    import fcntl  # not there on every system that runs packages

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise PackageError(busy) from None
        yield
    finally:
        os.close(handle)
