"""Weights that bitsandbytes has quantized, as they are: NF4, FP4 (arXiv 2305.14314), LLM.int8 (arXiv 2208.07339).

Dims: N outputs and K inputs of the linear whose weight is X.weight; S values a block, B blocks.

    X.weight                    two codes a byte of the flattened weight, whatever dtype it is said to be
    X.weight.absmax             float32 [B], or uint8 [B]: codes of it, quantized again (nested)
    X.weight.quant_map          float32 [16]: what codes stand for; nested_quant_map [256] and nested_absmax the same
    X.weight.quant_state.bitsandbytes__nf4
                                JSON as bytes: quant_type, blocksize, shape, nested_blocksize, nested_offset
or
    X.weight                    int8 [N, K], w = code * SCB / 127
    X.SCB                       float32 [N]

4 bits go to MatMulBnb4, which has this very layout. 8 bits go to MatMulNBits, the scale of a row repeated a block.
"""

import json
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from ..quant.nf4 import TABLES, dequantize_flat
from ..quant.recipe import WeightFormat
from ..quant.rewrite import is_linear, linear_node, linear_pieces
from ..runtime.errors import CheckpointError

if TYPE_CHECKING:
    from .checkpoint import CheckpointSource, StoredTensor

__all__ = ["Packed", "PackedSource", "compute_in_float32", "dequantized_rows", "fold_packed", "keep_packed"]

_STATE = ".quant_state.bitsandbytes__"
_ITEM_SIZES = {"F32": 4, "I8": 1, "U8": 1}
_TOP = 127


@dataclass(frozen=True)
class Nested:
    """absmax = table[code] * absmax of the block of codes + offset."""

    table: "StoredTensor"
    absmax: "StoredTensor"
    block_size: int
    offset: float


@dataclass(frozen=True)
class Packed:
    """Where the parts of a quantized weight are, and the format that ONNX Runtime reads them in."""

    format: WeightFormat
    codes: "StoredTensor"
    scales: "StoredTensor"
    nested: Nested | None = None


def compute_in_float32(model: nn.Module) -> None:
    """Lets linears of bitsandbytes in PyTorch compute in float32, as the reference of all else does.

    Else they take the dtype that config.json names, and bfloat16 whatever it says on a CPU with AVX512-BF16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module).update(support_avx512bf16_for_cpu=False, compute_dtype=torch.float32, compute_type_is_set=True)


def fold_packed(tensors: Mapping[str, "StoredTensor"]) -> dict[str, "StoredTensor"]:
    """The tensors of a checkpoint, each quantized weight as one of its true shape, what belongs to it left out.

    Raises CheckpointError that names a weight of a kind that is not known.
    """
    found = dict(tensors)
    for name in tensors:
        weight, state, kind = name.partition(_STATE)
        if state:
            found[weight] = _four_bits(found, weight, kind, found.pop(name))
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            codes = _companion(found, weight)
            found.pop(f"{weight}_format", None)
            # ONNX Runtime rounds activations block by block; fine blocks keep one outlier from coarsening the others.
            packed = Packed(WeightFormat(bits=8, symmetric=True), codes, found.pop(name))
            found[weight] = replace(codes, packed=packed)
    return found


def _four_bits(found: dict[str, "StoredTensor"], weight: str, kind: str, state: "StoredTensor") -> "StoredTensor":
    codes, absmax = _companion(found, weight), _companion(found, f"{weight}.absmax", take=True)
    table = _companion(found, f"{weight}.quant_map", take=True)
    try:
        said: dict[str, Any] = json.loads(_raw(state).tobytes())
        format = WeightFormat(bits=4, block_size=said["blocksize"], values=said["quant_type"])
        num_rows, num_columns = said["shape"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{state.file}: {weight}: quant_state is unreadable ({error}); save it again") from error
    values = TABLES.get(format.values) if format.values != "integer" else None
    if values is None or not np.array_equal(_raw(table).view("<f4"), values):
        raise CheckpointError(f"{state.file}: {weight}: values {kind} are neither nf4 nor fp4; save it again in one")
    nested = None
    if "nested_offset" in said:
        nested = Nested(
            _companion(found, f"{weight}.nested_quant_map", take=True),
            _companion(found, f"{weight}.nested_absmax", take=True),
            int(said["nested_blocksize"]),
            float(said["nested_offset"]),
        )
    return replace(
        codes,
        dtype=format.values.upper(),
        shape=(num_rows, num_columns),
        packed=Packed(format, replace(codes, dtype="U8", shape=(-(-num_rows * num_columns // 2),)), absmax, nested),
    )


def _companion(found: dict[str, "StoredTensor"], name: str, *, take: bool = False) -> "StoredTensor":
    if name not in found:
        raise CheckpointError(f"checkpoint: {name} is missing, though others of its weight are there; copy it again")
    return found.pop(name) if take else found[name]


def keep_packed(
    graph: ir.Model, tensors: Mapping[str, "StoredTensor"], source: "CheckpointSource"
) -> "CheckpointSource | PackedSource":
    """Lets a float graph compute with the codes that the checkpoint holds; gives the source that has them.

    Recipes reach the weights that are left. Raises CheckpointError where such a weight belongs to no linear.
    """
    pieces: dict[str, _Piece] = {}
    for name, tensor in tensors.items():
        if tensor.packed is None:
            continue
        value = graph.graph.initializers[name]
        uses = [(use.node, use.idx) for use in value.uses()]
        if tensor.rows is not None or tensor.transposed or not all(is_linear(*use) for use in uses):
            raise CheckpointError(f"{tensor.file}: {name} is quantized, but more than the weight of a linear here")
        (num_rows, num_columns), format = tensor.shape, tensor.packed.format
        made: list[ir.Value] = []
        for piece, shape in linear_pieces(num_rows, num_columns, format).items():
            dtype = value.dtype if piece == "scales" else ir.DataType.UINT8
            assert dtype is not None
            ending = "_Q" if piece == "quantized" else f"_{piece}"
            made.append(ir.Value(name=f"{name}{ending}", shape=ir.Shape(shape), type=ir.TensorType(dtype)))
            pieces[f"{name}{ending}"] = _Piece(tensor, piece == "scales", shape)
        for node, _ in uses:
            new = linear_node(node, made, format, num_rows, num_columns)
            ir.convenience.replace_nodes_and_values(graph.graph, node, [node], [new], node.outputs, new.outputs)
        del graph.graph.initializers[name]
        for new_value in made:
            graph.graph.initializers.add(new_value)
    return PackedSource(source, pieces) if pieces else source


@dataclass(frozen=True)
class _Piece:
    """An initializer that holds the codes of a weight, or its scales."""

    tensor: "StoredTensor"
    is_scales: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedSource:
    """A WeightSource with the pieces of quantized weights beside what `source` has."""

    source: "CheckpointSource"
    pieces: Mapping[str, _Piece]

    def shape(self, parameter: str) -> tuple[int, ...]:
        piece = self.pieces.get(parameter)
        return self.source.shape(parameter) if piece is None else piece.shape

    def origin(self, parameter: str) -> Hashable:
        return self.pieces.get(parameter) or self.source.origin(parameter)

    def rows(self, parameter: str, start: int, stop: int) -> NDArray[Any]:
        """uint8 codes and float32 scales, as ONNX Runtime lays them out; float32 of what is not quantized."""
        piece = self.pieces.get(parameter)
        if piece is None:
            return self.source.rows(parameter, start, stop)
        packed = piece.tensor.packed
        assert packed is not None
        if packed.format.is_table:
            return _absmax(packed, start, stop) if piece.is_scales else _raw(packed.codes, start, stop)
        blocks = -(-piece.tensor.shape[1] // packed.format.block_size)
        if piece.is_scales:
            rows = np.arange(start, stop) // blocks
            return _scales(packed, int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]
        codes_NK = _codes(piece.tensor, start, stop) ^ 0x80  # signed codes as unsigned ones around 128
        missing = blocks * packed.format.block_size - codes_NK.shape[1]
        return np.pad(codes_NK, ((0, 0), (0, missing)), constant_values=128).reshape(stop - start, blocks, -1)


def dequantized_rows(tensor: "StoredTensor", start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a quantized weight as floats, float32 [stop - start, K]."""
    packed, num_columns = tensor.packed, tensor.shape[1]
    assert packed is not None
    if not packed.format.is_table:
        return _codes(tensor, start, stop).view(np.int8) * _scales(packed, start, stop)[:, None]
    size = packed.format.block_size
    first, last = start * num_columns, stop * num_columns
    block, end = first // size, -(-last // size)
    codes = _raw(packed.codes, block * size // 2, min(end * size // 2, packed.codes.shape[0]))
    assert packed.format.values != "integer"
    values = dequantize_flat(codes, _absmax(packed, block, end), packed.format.values, size)
    return values[first - block * size : last - block * size].reshape(stop - start, num_columns)


def _codes(tensor: "StoredTensor", start: int, stop: int) -> NDArray[np.uint8]:
    assert tensor.packed is not None
    num_columns = tensor.shape[1]
    return _raw(tensor.packed.codes, start * num_columns, stop * num_columns).reshape(stop - start, num_columns)


def _scales(packed: Packed, start: int, stop: int) -> NDArray[np.float32]:
    """Of rows, float32 [stop - start]."""
    scales: NDArray[np.float32] = _raw(packed.scales, start, stop).view("<f4")
    return scales / np.float32(_TOP)


def _absmax(packed: Packed, start: int, stop: int) -> NDArray[np.float32]:
    """Of blocks, float32 [stop - start]."""
    nested = packed.nested
    if nested is None:
        return _raw(packed.scales, start, stop).view("<f4")
    block = start // nested.block_size
    outer = _raw(nested.absmax, block, -(-stop // nested.block_size)).view("<f4")
    scales: NDArray[np.float32] = outer[np.arange(start, stop) // nested.block_size - block]
    table: NDArray[np.float32] = _raw(nested.table).view("<f4")
    return table[_raw(packed.scales, start, stop)] * scales + np.float32(nested.offset)


def _raw(tensor: "StoredTensor", start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
    """The bytes of values start to stop of a tensor, in the order of the file."""
    size = _ITEM_SIZES.get(tensor.dtype)
    if size is None:
        raise CheckpointError(f"{tensor.file}: a part of a quantized weight is {tensor.dtype}; save it again")
    stop = int(np.prod(tensor.shape)) if stop is None else stop
    with tensor.file.open("rb", buffering=0) as stream:
        raw = os.pread(stream.fileno(), (stop - start) * size, tensor.offset + start * size)
    if len(raw) != (stop - start) * size:
        raise CheckpointError(f"{tensor.file}: ends inside a quantized weight; the file is damaged, copy it again")
    return np.frombuffer(raw, np.uint8)
