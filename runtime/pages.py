"""Two words to Linux about a graph's weights once it is loaded. Elsewhere, and where it declines, nothing happens.

They change no value and no address: only which pages of memory are in the process, and how large they are.
"""

import ctypes
import mmap
import re
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["file_pages_dropped", "join_pages"]

_DONTNEED = 4
_COLLAPSE = 25  # Linux 6.1
_LARGE = 2 << 20  # bytes of a large page on x86 and most of ARM; others decline
_PIECE = 32 << 20
_WORTHWHILE = 8 << 20
_FULL = 0.95
_dropping = threading.Lock()
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")


@dataclass(frozen=True)
class _Mapping:
    start: int
    stop: int
    access: str
    inode: int
    name: str
    resident: int  # bytes in memory
    anonymous: int  # of these, bytes that belong to no file (any more)


@contextmanager
def file_pages_dropped(file: Path) -> Generator[None]:
    """Takes the pages of a file that the block maps out of the process; they come back from the system's cache.

    What loading has only looked at does not count as memory of the process then. Mappings that were written to are
    left alone: dropping would undo that. So are older ones: another thread may let go of one at any time, and what it
    maps to the same place next would be lost. For that reason one block of a process runs after the other.
    """
    with _dropping:
        before = {mapping.start for mapping in _mappings() if mapping.name == str(file)}
        yield
        for mapping in _mappings():
            if mapping.name == str(file) and mapping.anonymous == 0 and mapping.start not in before:
                _advise(mapping.start, mapping.stop, _DONTNEED)


def join_pages() -> None:
    """Moves large arrays of the process into large pages, as far as there are any free.

    Weights that are read once a token are read faster so: a processor knows the places of few thousand pages at a time,
    and looks ahead no further than to the end of one. Takes seconds for gigabytes, during which all goes on as usual.
    """
    for mapping in _mappings():
        size = mapping.stop - mapping.start
        full = mapping.resident >= _FULL * size  # else it would fill holes that were meant to be empty
        if mapping.inode == 0 and mapping.access.startswith("rw-p") and size >= _WORTHWHILE and full:
            start, stop = -(-mapping.start // _LARGE) * _LARGE, mapping.stop // _LARGE * _LARGE
            for piece in range(start, stop, _PIECE):  # a process that ends waits for one piece at most
                _advise(piece, min(piece + _PIECE, stop), _COLLAPSE)


def _advise(start: int, stop: int, advice: int) -> None:
    """madvise(2); what it answers does not matter."""
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(advice))


def _mappings() -> Iterator[_Mapping]:
    """The memory map of this process; nothing where there is no /proc."""
    if not sys.platform.startswith("linux") or mmap.PAGESIZE > _LARGE:
        return
    try:
        text = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    header: re.Match[str] | None = None
    resident = 0
    for line in text.splitlines():
        found = _HEADER.fullmatch(line)
        if found is not None:
            header = found
        elif line.startswith("Rss:"):
            resident = int(line.split()[1]) << 10
        elif line.startswith("Anonymous:") and header is not None:
            start, stop, access, inode, name = header.groups()
            anonymous = int(line.split()[1]) << 10
            yield _Mapping(int(start, 16), int(stop, 16), access, int(inode), name, resident, anonymous)
