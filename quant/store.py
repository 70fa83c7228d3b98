"""Writes a graph and its weights, a few megabytes at a time.

`<stem>.onnx_data` holds the bytes of every initializer of 1 KiB or more, in the order of the graph; `<stem>.onnx`
holds the graph and the small ones. Equal graphs and equal weights give equal bytes. A weight is read once, in chunks of
rows, and each chunk goes to its place in each of the pieces (codes, scales, zero points): none is in memory as a whole
but codes that lie by columns, which are gathered first, a byte a value.
"""

import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..runtime.errors import CapacityError, CheckpointError, RecipeError
from ..runtime.manifest import FileEntry, GraphFile, TensorInfo
from ..runtime.package import file_entry
from .dynamic import quantize_channels
from .pack import Piece, pack_codes, pack_zero_points
from .rewrite import StoredTensor
from .rtn import quantize_rows

__all__ = ["Progress", "WeightSource", "WrittenGraph", "write_graph"]

Progress = Callable[[int, int, str], None]  # done bytes, total bytes, what is at work

_INLINE_BYTES = 1024  # smaller tensors stay inside the .onnx file
_CHUNK_BYTES = 4 << 20  # float32 bytes of a chunk; larger ones are slower, as they leave the caches
_PAGE = 4096
_CACHE_LINE = 64
_GRAPH_SLACK = 16 << 20  # room for the .onnx file itself, whose size is not known before it is made


class WeightSource(Protocol):
    """Where the float values of parameters come from."""

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        ...

    def rows(self, parameter: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Slices [start, stop) of axis 0: float32 [stop - start, ...]."""
        ...


@dataclass(frozen=True)
class WrittenGraph:
    """The two files of a graph (plain names inside their folder) and what the manifest says about them."""

    graph: str
    data: str
    files: dict[str, FileEntry]
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    formats: dict[str, str]

    def graph_file(self, precision: str) -> GraphFile:
        """The manifest's entry of this graph."""
        return GraphFile(self.graph, self.data, precision, self.inputs, self.outputs, self.formats)


@dataclass(frozen=True)
class _Slot:
    """The place of an initializer: an offset in the data file, or inside the graph (`small`)."""

    value: ir.Value
    stored: StoredTensor | None  # None for a constant of the graph
    num_bytes: int
    offset: int | None
    small: bytearray = field(default_factory=bytearray)


def write_graph(
    model: ir.Model,
    stored: tuple[StoredTensor, ...],
    source: WeightSource,
    folder: Path,
    stem: str,
    progress: Progress | None = None,
) -> WrittenGraph:
    """Writes `<stem>.onnx` and `<stem>.onnx_data` into `folder` and syncs them; `stored` is what `rewrite` gave.

    The initializers of `model` get their values as it goes. Raises CheckpointError where the source's shapes or values
    do not fit, CapacityError where the disk cannot take the files; then neither file is left.
    """
    graph_path, data_path = folder / f"{stem}.onnx", folder / f"{stem}.onnx_data"
    slots, data_size = _lay_out(model.graph, stored)
    _check_sources(slots, source)
    _check_space(data_path, data_size)
    finished = False
    try:
        with _disk_errors(data_path, data_size):
            file = os.open(data_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write_data(file, data_path, data_size, slots, source, progress)
        finally:
            os.close(file)
        _fill_initializers(slots, data_path.name)
        _write_graph_file(model, graph_path)
        finished = True
    finally:
        if not finished:
            graph_path.unlink(missing_ok=True)
            data_path.unlink(missing_ok=True)
    files = {path.name: file_entry(path) for path in (graph_path, data_path)}
    inputs = {str(value.name): _tensor_info(value) for value in model.graph.inputs}
    outputs = {str(value.name): _tensor_info(value) for value in model.graph.outputs}
    formats = {tensor.parameter: tensor.stored_as for tensor in stored if len(tensor.parameter_shape) > 1}
    return WrittenGraph(graph_path.name, data_path.name, files, inputs, outputs, formats)


def _lay_out(graph: ir.Graph, stored: tuple[StoredTensor, ...]) -> tuple[list[_Slot], int]:
    """Places of all initializers, and the size of the data file.

    Tensors of 16 pages or more start on a page, as ONNX recommends so that they can be mapped into memory. Smaller ones
    start on a cache line: pages would make the file of a tiny model mostly padding.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    slots: list[_Slot] = []
    end = 0
    for name, value in graph.initializers.items():
        tensor = by_name.pop(name, None)
        num_bytes = tensor.num_bytes if tensor is not None else len(_constant(value))
        if num_bytes < _INLINE_BYTES:
            slots.append(_Slot(value, tensor, num_bytes, None, bytearray(num_bytes)))
            continue
        unit = _PAGE if num_bytes >= 16 * _PAGE else _CACHE_LINE
        offset = -(-end // unit) * unit
        slots.append(_Slot(value, tensor, num_bytes, offset))
        end = offset + num_bytes
    assert not by_name, f"{next(iter(by_name))}: is no initializer of the graph"
    return slots, end


def _constant(value: ir.Value) -> bytes:
    assert value.const_value is not None, f"{value.name}: a parameter that rewrite did not see"
    return value.const_value.tobytes()


def _check_sources(slots: list[_Slot], source: WeightSource) -> None:
    for slot in slots:
        if slot.stored is not None:
            shape, expected = tuple(source.shape(slot.stored.parameter)), slot.stored.parameter_shape
            assert expected, f"{slot.stored.parameter}: a scalar parameter has no rows to read"
            if shape != expected:
                raise CheckpointError(f"{slot.stored.parameter}: shape {list(shape)}, the graph says {list(expected)}")


def _check_space(path: Path, num_bytes: int) -> None:
    with _disk_errors(path, num_bytes):
        free = shutil.disk_usage(path.parent).free
    if free < num_bytes + _GRAPH_SLACK:
        raise CapacityError(f"{path}: needs {num_bytes + _GRAPH_SLACK} bytes, the disk has {free} free; make room")


@contextmanager
def _disk_errors(path: Path, num_bytes: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CapacityError(f"{path}: cannot write {num_bytes} bytes: {error.strerror}; make room") from error


def _write_data(
    file: int, path: Path, size: int, slots: list[_Slot], source: WeightSource, progress: Progress | None
) -> None:
    with _disk_errors(path, size):
        os.ftruncate(file, size)
    total = sum(slot.num_bytes for slot in slots)
    done = 0

    def put(slot: _Slot, position: int, data: bytes) -> None:
        nonlocal done
        done += len(data)
        if slot.offset is None:
            slot.small[position : position + len(data)] = data
            return
        with _disk_errors(path, size):
            _write_at(file, data, slot.offset + position)

    pieces: dict[str, list[_Slot]] = {}  # by parameter
    for slot in slots:
        if slot.stored is None:
            put(slot, 0, _constant(slot.value))
        else:
            pieces.setdefault(slot.stored.parameter, []).append(slot)
    for parameter, group in pieces.items():
        tensors = [slot.stored for slot in group if slot.stored is not None]
        columns = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in tensors if tensor.transposed}
        for start, arrays in _chunks(tensors, source):
            for slot, array in zip(group, arrays, strict=True):
                gathered = columns.get(str(slot.value.name))
                if gathered is not None:
                    gathered[:, start : start + len(array)] = array.T
                else:
                    put(slot, array.nbytes // len(array) * start, array.tobytes())
            if progress is not None:
                progress(done, total, parameter)
        for slot in group:
            if str(slot.value.name) in columns:
                put(slot, 0, columns[str(slot.value.name)].tobytes())
    with _disk_errors(path, size):
        os.fsync(file)


def _chunks(tensors: list[StoredTensor], source: WeightSource) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """The pieces of one parameter, some rows at a time: the first row, and an array [rows, ...] a piece."""
    parameter, shape = tensors[0].parameter, tensors[0].parameter_shape
    step = max(1, _CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        rows = source.rows(parameter, start, stop)
        assert rows.dtype == np.float32, f"{parameter}: a source gives float32"
        assert rows.shape == (stop - start, *shape[1:]), f"{parameter}: rows {rows.shape}"
        yield start, _convert(rows, tensors)


def _convert(rows: npt.NDArray[np.float32], tensors: list[StoredTensor]) -> list[npt.NDArray[Any]]:
    """The bytes of some rows for each piece of their weight, in the order of `tensors`."""
    name, format = tensors[0].parameter, tensors[0].format
    if format is None or not format.is_quantized:
        (tensor,) = tensors
        return [_cast(rows, tensor.dtype, name)]
    if format.is_dynamic:
        channel_codes, channel_scales = quantize_channels(rows, name=name)
        return [channel_codes if tensor.piece == "quantized" else channel_scales for tensor in tensors]
    scale_dtype = next(tensor.dtype for tensor in tensors if tensor.piece == "scales")
    codes, scales, zero_points = quantize_rows(rows, format, scale_dtype=scale_dtype, name=name)
    # A linear stores the padding of its last block, a table does not: rows of the table's bytes tell the two apart.
    packed_columns = _packed_columns(tensors, format.bits)
    pieces: dict[Piece, npt.NDArray[Any]] = {
        "quantized": pack_codes(codes, format, packed_columns),
        "scales": scales.astype(scale_dtype),
        "zero_points": pack_zero_points(zero_points, format),
    }
    return [pieces[tensor.piece] for tensor in tensors]


def _packed_columns(tensors: list[StoredTensor], bits: int) -> int:
    quantized = next(tensor for tensor in tensors if tensor.piece == "quantized")
    return math.prod(quantized.shape[1:]) * 8 // bits


def _cast(rows: npt.NDArray[np.float32], dtype: str, name: str) -> npt.NDArray[Any]:
    if dtype == "float32":
        return np.ascontiguousarray(rows)
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(rows.astype(np.float16))
    if not np.isfinite(half).all():
        raise RecipeError(f"{name}: {np.abs(rows).max():.6g} does not fit float16; give this weight bits 32")
    return half


def _write_at(file: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, memoryview(data)[written:], offset + written)


def _fill_initializers(slots: list[_Slot], data_name: str) -> None:
    for slot in slots:
        value = slot.value
        if slot.stored is None and slot.offset is None:
            continue  # a small constant has its value already
        dtype = value.dtype if value.const_value is None else value.const_value.dtype
        assert dtype is not None, value.name
        shape = value.shape if value.const_value is None else value.const_value.shape
        assert isinstance(shape, ir.Shape), value.name
        if slot.offset is None:
            array = np.frombuffer(slot.small, dtype.numpy()).reshape(shape.numpy())
            value.const_value = ir.Tensor(array, dtype, name=value.name)
        else:
            value.const_value = ir.ExternalTensor(
                data_name, slot.offset, slot.num_bytes, dtype, shape=shape, name=str(value.name)
            )


def _write_graph_file(model: ir.Model, path: Path) -> None:
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    with _disk_errors(path, len(text)), path.open("wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _tensor_info(value: ir.Value) -> TensorInfo:
    assert value.dtype is not None, f"{value.name}: a graph input or output without a type"
    assert value.shape is not None, f"{value.name}: a graph input or output without a shape"
    shape = tuple("?" if isinstance(size, ir.SymbolicDim) and size.value is None else str(size) for size in value.shape)
    return TensorInfo(str(value.dtype.numpy()), shape)
