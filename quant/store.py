"""Writes a graph and its weights, a few megabytes at a time.

`<stem>.onnx_data` holds the bytes of every initializer of 1 KiB or more, in the order of the graph; `<stem>.onnx`
holds the graph and the small ones. Equal graphs and equal weights give equal bytes. A weight is read in chunks of
rows, and each chunk goes to its place in each of the pieces (codes, scales, zero points): none is in memory as a whole
but codes that lie by columns, which are gathered first, a byte a value.
"""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.errors import CheckpointError
from ..runtime.manifest import FileEntry, GraphFile, TensorInfo
from ..runtime.package import file_entry
from .data_file import Progress, Slot, WeightSource, check_space, constant_bytes, disk_errors, write_data
from .found import FoundCodes
from .pack import Piece
from .recipe import WeightFormat
from .rewrite import StoredTensor, kept_formats, piece_names

__all__ = ["Content", "Place", "Progress", "WeightSource", "WrittenGraph", "places", "write_graph"]

_INLINE_BYTES = 1024  # smaller tensors stay inside the .onnx file
_PAGE = 4096
_CACHE_LINE = 64
_GRAPH_SLACK = 16 << 20  # room for the .onnx file itself, whose size is not known before it is made


@dataclass(frozen=True)
class Content:
    """What an initializer holds: equal contents have equal bytes."""

    origin: Hashable
    piece: Piece
    dtype: str
    num_bytes: int
    format: WeightFormat | None  # as it is stored; None for what was cast and no more
    is_transposed: bool = False


@dataclass(frozen=True)
class Place:
    """Where bytes are: a data file by name, and an offset in it."""

    data: str
    offset: int


@dataclass(frozen=True)
class WrittenGraph:
    """The two files of a graph (plain names inside their folder) and what the manifest says about them."""

    graph: str
    data: str
    files: dict[str, FileEntry]
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    formats: dict[str, str]
    shared: tuple[str, ...]

    def graph_file(self, precision: str) -> GraphFile:
        """The manifest's entry of this graph."""
        return GraphFile(self.graph, self.data, precision, self.inputs, self.outputs, self.formats, self.shared)


def write_graph(
    model: ir.Model,
    stored: tuple[StoredTensor, ...],
    source: WeightSource,
    folder: Path,
    stem: str,
    progress: Progress | None = None,
    *,
    known: Mapping[Content, Place] = {},
    found: Mapping[str, FoundCodes] = {},
) -> WrittenGraph:
    """Writes `<stem>.onnx` and `<stem>.onnx_data` into `folder` and syncs them; `stored` is what `rewrite` gave.

    A parameter whose bytes `known` has, all of them, is not stored again: the graph reads them there. `found` has the
    codes of weights that calibration found, by parameter. The initializers
    of `model` get their values as it goes. Raises CheckpointError where the source's shapes or values
    do not fit, CapacityError where the disk cannot take the files; then neither file is left.
    """
    graph_path, data_path = folder / f"{stem}.onnx", folder / f"{stem}.onnx_data"
    slots, data_size = _lay_out(model.graph, stored, _borrowed(stored, source, known))
    _check_sources(slots, source)
    check_space(data_path, data_size + _GRAPH_SLACK)
    finished = False
    try:
        with disk_errors(data_path, data_size):
            file = os.open(data_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            data_entry = write_data(file, data_path, data_size, slots, source, progress, found)
        finally:
            os.close(file)
        _fill_initializers(slots, data_path.name)
        _write_graph_file(model, graph_path)
        finished = True
    finally:
        if not finished:
            graph_path.unlink(missing_ok=True)
            data_path.unlink(missing_ok=True)
    files = {graph_path.name: file_entry(graph_path), data_path.name: data_entry}
    inputs = {str(value.name): _tensor_info(value) for value in model.graph.inputs}
    outputs = {str(value.name): _tensor_info(value) for value in model.graph.outputs}
    formats = kept_formats(model.graph)
    formats |= {
        tensor.parameter: tensor.stored_as
        for tensor in stored
        if len(tensor.parameter_shape) > 1 and not tensor.is_kept
    }
    shared = tuple(sorted({slot.shared for slot in slots if slot.shared is not None}))
    return WrittenGraph(graph_path.name, data_path.name, files, inputs, outputs, formats, shared)


def places(graph: ir.Graph, formats: Mapping[str, WeightFormat | None], source: WeightSource) -> dict[Content, Place]:
    """What the data files of a stored graph hold of the parameters in `formats`, none of them transposed, and where."""
    found: dict[Content, Place] = {}
    for parameter, format in formats.items():
        for name, piece in piece_names(parameter).items():
            tensor = graph.initializers[name].const_value if name in graph.initializers else None
            if isinstance(tensor, ir.ExternalTensor):
                dtype, stored = tensor.dtype.numpy().name, None if format is None else format.stored
                content = Content(source.origin(parameter), piece, dtype, tensor.nbytes, stored)
                found[content] = Place(os.path.basename(tensor.path), tensor.offset or 0)
    return found


def _content_of(tensor: StoredTensor, source: WeightSource) -> Content:
    origin = source.origin(tensor.parameter)
    stored = None if tensor.format is None else tensor.format.stored
    return Content(origin, tensor.piece, tensor.dtype, tensor.num_bytes, stored, tensor.transposed)


def _borrowed(
    stored: tuple[StoredTensor, ...], source: WeightSource, known: Mapping[Content, Place]
) -> dict[str, Place]:
    """Places, by initializer, of the parameters that are known as a whole."""
    found = {tensor.name: known.get(_content_of(tensor, source)) for tensor in stored}
    partial = {tensor.parameter for tensor in stored if found[tensor.name] is None}
    return {t.name: place for t in stored if (place := found[t.name]) is not None and t.parameter not in partial}


def _lay_out(
    graph: ir.Graph, stored: tuple[StoredTensor, ...], borrowed: Mapping[str, Place]
) -> tuple[list[Slot], int]:
    """Places of all initializers, and the size of the data file.

    Tensors of 16 pages or more start on a page, as ONNX recommends so that they can be mapped into memory. Smaller ones
    start on a cache line: pages would make the file of a tiny model mostly padding.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    slots: list[Slot] = []
    end = 0
    for name, value in graph.initializers.items():
        tensor = by_name.pop(name, None)
        num_bytes = tensor.num_bytes if tensor is not None else len(constant_bytes(value))
        place = borrowed.get(name)
        if place is not None:
            slots.append(Slot(value, tensor, num_bytes, place.offset, shared=place.data))
            continue
        if num_bytes < _INLINE_BYTES:
            slots.append(Slot(value, tensor, num_bytes, None, bytearray(num_bytes)))
            continue
        unit = _PAGE if num_bytes >= 16 * _PAGE else _CACHE_LINE
        offset = -(-end // unit) * unit
        slots.append(Slot(value, tensor, num_bytes, offset))
        end = offset + num_bytes
    assert not by_name, f"{next(iter(by_name))}: is no initializer of the graph"
    return slots, end


def _check_sources(slots: list[Slot], source: WeightSource) -> None:
    for slot in slots:
        if slot.stored is not None:
            shape, expected = tuple(source.shape(slot.stored.parameter)), slot.stored.parameter_shape
            assert expected, f"{slot.stored.parameter}: a scalar parameter has no rows to read"
            if shape != expected:
                raise CheckpointError(f"{slot.stored.parameter}: shape {list(shape)}, the graph says {list(expected)}")


def _fill_initializers(slots: list[Slot], data_name: str) -> None:
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
                slot.shared or data_name, slot.offset, slot.num_bytes, dtype, shape=shape, name=str(value.name)
            )


def _write_graph_file(model: ir.Model, path: Path) -> None:
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    with disk_errors(path, len(text)), path.open("wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _tensor_info(value: ir.Value) -> TensorInfo:
    assert value.dtype is not None, f"{value.name}: a graph input or output without a type"
    assert value.shape is not None, f"{value.name}: a graph input or output without a shape"
    shape = tuple("?" if isinstance(size, ir.SymbolicDim) and size.value is None else str(size) for size in value.shape)
    return TensorInfo(str(value.dtype.numpy()), shape)
