"""sha256 of large files beside other work: hashlib and file reads let other threads run."""

import hashlib
import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from ..runtime.manifest import FileEntry
from ..runtime.package import file_entry

__all__ = ["FileDigests", "FollowingDigest"]

_BLOCK_BYTES = 4 << 20
# So much goes to the disk at a time, while more is computed; a sync at the end would wait for all.
_SYNC_BYTES = 64 << 20


class FollowingDigest:
    """The digest of a file that is being written from its start, close behind the writer.

    What is behind the writer is read back, from memory as a rule, and synced to the disk.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._ends: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(1, "digest")
        self._entry = self._pool.submit(self._follow)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.put(None)
        self._pool.shutdown()

    def advance(self, end: int) -> None:
        """The bytes before `end` will not change any more."""
        self._ends.put(end)

    def finish(self) -> FileEntry:
        """Of all bytes that were told of, which are on the disk by then. Raises OSError where the disk cannot."""
        self._ends.put(None)
        return self._entry.result()

    def _follow(self) -> FileEntry:
        digest, position, synced = hashlib.sha256(), 0, 0
        while (end := self._ends.get()) is not None:
            while position < end:
                block = os.pread(self._file, min(_BLOCK_BYTES, end - position), position)
                assert block, "the writer told of bytes that are not there"
                digest.update(block)
                position += len(block)
                if position - synced >= _SYNC_BYTES:
                    os.fsync(self._file)  # not fdatasync, which macOS has not
                    synced = position
        os.fsync(self._file)
        return FileEntry(digest.hexdigest(), position)


class FileDigests:
    """Digests of files that do not change, made while the block runs; when it ends early, what is left is not read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "digests")
        self._entries = self._pool.submit(lambda: {file.name: file_entry(file, self._stop) for file in files})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown()

    def entries(self) -> dict[str, FileEntry]:
        """By file name, once all are there. Raises OSError where a file cannot be read."""
        return self._entries.result()
