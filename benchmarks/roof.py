"""The memory bandwidth of the box: how fast its cores read a buffer, by the fastest plain reader that there is.

A decode step reads every weight once, so this is the roof of its speed. The buffer is gone through from end to end by
all threads, each its own part, as the weights are; it is larger than the caches, where memory allows it.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

__all__ = ["READERS", "Roof"]


def _either(part: NDArray[np.float32]) -> object:
    return np.bitwise_or.reduce(part.view(np.uint64))


def _product(part: NDArray[np.float32]) -> object:
    return np.dot(part, part)


def _largest(part: NDArray[np.float32]) -> object:
    return part.max()


# Vector loads and next to nothing else, without the interpreter's lock. Which is the fastest depends on the box.
READERS: dict[str, Callable[[NDArray[np.float32]], object]] = {"or": _either, "dot": _product, "max": _largest}


class Roof:
    """Reads of one buffer by `num_threads` threads."""

    def __init__(self, num_bytes: int, num_threads: int) -> None:
        values = num_bytes // 8 // num_threads * 2  # a thread; whole 64-bit words
        self._buffer = np.full(values * num_threads, 1, np.float32)  # a page that was never written is no memory
        self._parts = self._buffer.reshape(num_threads, values)
        self._threads = ThreadPoolExecutor(num_threads)

    def measure(self, times: int = 2) -> float:
        """Bytes a second of the fastest of some reads, by each reader `times`."""
        return max(self._read(name) for _ in range(times) for name in READERS)

    def _read(self, name: str) -> float:
        started = time.perf_counter()
        list(self._threads.map(READERS[name], self._parts))
        return self._buffer.nbytes / (time.perf_counter() - started)
