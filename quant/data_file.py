"""Fills the data file of a graph: read once in order, converted on every core, hashed close behind.

What is written does not depend on the number of threads: each row of each slot has a place of its own.
"""

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..runtime.errors import CapacityError
from ..runtime.manifest import FileEntry
from .convert import convert_rows
from .digest import FollowingDigest
from .found import FoundCodes
from .nf4 import whole_rows
from .rewrite import StoredTensor
from .source import WeightSource

__all__ = ["Progress", "Slot", "WeightSource", "check_space", "constant_bytes", "disk_errors", "write_data"]

Progress = Callable[[int, int, str], None]  # done bytes, total bytes, what is at work

_CHUNK_BYTES = 4 << 20  # float32 bytes of a chunk; there is one more of them in memory than there are threads


@dataclass(frozen=True)
class Slot:
    """The place of an initializer: an offset in the data file, or inside the graph (`small`)."""

    value: ir.Value
    stored: StoredTensor | None  # None for a constant of the graph
    num_bytes: int
    offset: int | None
    small: bytearray = field(default_factory=bytearray)
    shared: str | None = None  # the data file of another graph that has these bytes: not written again

    @property
    def end(self) -> int:
        """Where it ends in the data file; 0 for one that is not there."""
        return 0 if self.offset is None else self.offset + self.num_bytes


@dataclass(frozen=True)
class _Parameter:
    """A parameter and its slots, which follow one another in the file."""

    name: str
    shape: tuple[int, ...]
    slots: list[Slot]
    tensors: list[StoredTensor]  # of the slots
    columns: dict[str, npt.NDArray[Any]]  # by slot: what its rows are columns of, gathered before it is written


def write_data(
    file: int,
    path: Path,
    size: int,
    slots: list[Slot],
    source: WeightSource,
    progress: Progress | None,
    found: Mapping[str, FoundCodes] = {},
) -> FileEntry:
    """Fills `file`, opened at `path`, to `size` bytes, but for what other files have, and syncs it.

    `found` has codes by parameter; those of other parameters follow from their values.

    Raises what the source and the conversion raise, and CapacityError where the disk cannot take it.
    """
    with disk_errors(path, size):
        os.ftruncate(file, size)
    slots = [slot for slot in slots if slot.shared is None]
    writer, total = _Writer(file, path, size, found), sum(slot.num_bytes for slot in slots)
    done = sum(writer.put(slot, 0, constant_bytes(slot.value)) for slot in slots if slot.stored is None)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with FollowingDigest(file) as digest, ThreadPoolExecutor(threads, "quantize") as pool:
        pending: deque[tuple[Future[int], _Parameter, bool]] = deque()

        def settle() -> None:
            nonlocal done
            future, parameter, is_last = pending.popleft()
            done += future.result()
            if is_last:
                done += writer.put_columns(parameter)
                digest.advance(max(slot.end for slot in parameter.slots))
            if progress is not None:
                progress(done, total, parameter.name)

        for parameter in _parameters(slots):
            for start, rows in _chunks(parameter, source):
                if len(pending) > threads:
                    settle()
                is_last = start + len(rows) == parameter.shape[0]
                pending.append((pool.submit(writer.put_rows, parameter, start, rows), parameter, is_last))
        while pending:
            settle()
        digest.advance(size)
        with disk_errors(path, size):
            return digest.finish()


class _Writer:
    """Puts bytes into slots. Threads may share one."""

    def __init__(self, file: int, path: Path, size: int, found: Mapping[str, FoundCodes]) -> None:
        self._file, self._path, self._size, self._found = file, path, size, found

    def put(self, slot: Slot, position: int, data: bytes) -> int:
        """Writes at `position` in the slot; gives the number of bytes."""
        if slot.offset is None:
            slot.small[position : position + len(data)] = data
            return len(data)
        written, start = 0, slot.offset + position
        with disk_errors(self._path, self._size):
            while written < len(data):
                written += os.pwrite(self._file, memoryview(data)[written:], start + written)
        return written

    def put_rows(self, parameter: _Parameter, start: int, rows: npt.NDArray[np.float32]) -> int:
        """Converts rows from `start` and writes them to each slot, those that are columns aside."""
        num_bytes = 0
        codes = self._found.get(parameter.name)
        found = None if codes is None else codes.rows(start, start + len(rows))
        for slot, array in zip(parameter.slots, convert_rows(rows, parameter.tensors, found), strict=True):
            columns = parameter.columns.get(str(slot.value.name))
            if columns is None:
                # What one row takes may be no whole number (quant/nf4.py); what the rows before take together is.
                place = slot.num_bytes // array.itemsize * start // parameter.shape[0] * array.itemsize
                num_bytes += self.put(slot, place, array.tobytes())
            else:
                columns[:, start : start + len(array)] = array.T
        return num_bytes

    def put_columns(self, parameter: _Parameter) -> int:
        """Writes what was gathered."""
        gathered = [(slot, parameter.columns.get(str(slot.value.name))) for slot in parameter.slots]
        return sum(self.put(slot, 0, columns.tobytes()) for slot, columns in gathered if columns is not None)


def constant_bytes(value: ir.Value) -> bytes:
    """What an initializer holds that is no parameter."""
    assert value.const_value is not None, f"{value.name}: a parameter that rewrite did not see"
    return value.const_value.tobytes()


def check_space(path: Path, num_bytes: int) -> None:
    """Raises CapacityError where the disk has no room for a file of so many bytes at `path`."""
    with disk_errors(path, num_bytes):
        free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise CapacityError(f"{path}: needs {num_bytes} bytes, the disk has {free} free; make room")


@contextmanager
def disk_errors(path: Path, num_bytes: int) -> Generator[None]:
    """What the system says of a disk becomes a CapacityError in one line."""
    try:
        yield
    except OSError as error:
        raise CapacityError(f"{path}: cannot write {num_bytes} bytes: {error.strerror}; make room") from error


def _parameters(slots: list[Slot]) -> Iterator[_Parameter]:
    """One after the other, so that what one gathers is let go before the next one's room is taken."""
    groups: dict[str, list[tuple[Slot, StoredTensor]]] = {}
    for slot in slots:
        if slot.stored is not None:
            groups.setdefault(slot.stored.parameter, []).append((slot, slot.stored))
    for name, group in groups.items():
        tensors = [tensor for _, tensor in group]
        columns = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in tensors if tensor.transposed}
        yield _Parameter(name, tensors[0].parameter_shape, [slot for slot, _ in group], tensors, columns)


def _chunks(parameter: _Parameter, source: WeightSource) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Some rows at a time: number of the first, and the rows."""
    name, shape, format = parameter.name, parameter.shape, parameter.tensors[0].format
    step = max(1, _CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))
    if format is not None and format.is_table:
        unit = whole_rows(shape[1], format.block_size)
        step = -(-step // unit) * unit
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        rows = source.rows(name, start, stop)
        is_codes = parameter.tensors[0].piece == "whole" and parameter.tensors[0].dtype == "uint8"
        assert rows.dtype == (np.uint8 if is_codes else np.float32), f"{name}: {rows.dtype} from the source"
        assert rows.shape == (stop - start, *shape[1:]), f"{name}: rows {rows.shape}"
        yield start, rows
