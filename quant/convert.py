"""Rows of a weight as the bytes of each initializer that holds a part of it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.errors import RecipeError
from .dynamic import quantize_channels
from .hqq import hqq_rows
from .nf4 import quantize_flat
from .pack import Piece, pack_codes, pack_zero_points
from .recipe import WeightFormat
from .rewrite import StoredTensor
from .rtn import Float32, dequantize_rows, quantize_rows, round_to

__all__ = ["convert_rows", "stands_for"]


def convert_rows(
    rows: npt.NDArray[np.float32], tensors: list[StoredTensor], found: Mapping[Piece, npt.NDArray[Any]] | None = None
) -> list[npt.NDArray[Any]]:
    """The bytes of some rows for each piece of their weight, in the order of `tensors`.

    `found` are the pieces of these rows that calibration found; without them the rows alone decide.
    """
    name, format = tensors[0].parameter, tensors[0].format
    if format is None or not format.is_quantized:
        (tensor,) = tensors
        return [_cast(rows, tensor.dtype, name)]
    if format.is_dynamic:
        channel_codes, channel_scales = quantize_channels(rows, name=name)
        return [channel_codes if tensor.piece == "quantized" else channel_scales for tensor in tensors]
    scale_dtype = next(tensor.dtype for tensor in tensors if tensor.piece == "scales")
    if format.values != "integer":
        packed, absmax = quantize_flat(rows, format.values, format.block_size, name=name)
        return [packed if tensor.piece == "quantized" else absmax.astype(scale_dtype) for tensor in tensors]
    if found is not None:
        return [found[tensor.piece].astype(tensor.dtype, copy=False) for tensor in tensors]
    find = hqq_rows if format.method == "hqq" else quantize_rows
    codes, scales, zero_points = find(rows, format, scale_dtype=scale_dtype, name=name)
    # A linear stores the padding of its last block, a table does not: rows of the table's bytes tell the two apart.
    packed_columns = _packed_columns(tensors, format.bits)
    pieces: dict[Piece, npt.NDArray[Any]] = {
        "quantized": pack_codes(codes, format, packed_columns),
        "scales": scales.astype(scale_dtype),
        "zero_points": pack_zero_points(zero_points, format),
    }
    return [pieces[tensor.piece] for tensor in tensors]


def stands_for(rows: Float32, format: WeightFormat, scale_dtype: str, name: str = "weight") -> Float32:
    """The values, float32, that a kernel computes with where rows [N, K] are stored so: a float, or blocks of codes."""
    if not format.is_quantized:
        return rows if format.bits == 32 else round_to(rows, "float16")
    assert format.has_blocks, format.label
    find = hqq_rows if format.method == "hqq" else quantize_rows
    return dequantize_rows(*find(rows, format, scale_dtype=scale_dtype, name=name), rows.shape[1])


def _packed_columns(tensors: list[StoredTensor], bits: int) -> int:
    quantized = next(tensor for tensor in tensors if tensor.piece == "quantized")
    return math.prod(quantized.shape[1:]) * 8 // bits


def _cast(rows: npt.NDArray[np.float32], dtype: str, name: str) -> npt.NDArray[Any]:
    if dtype in ("float32", "uint8"):
        return np.ascontiguousarray(rows)
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(rows.astype(np.float16))
    if not np.isfinite(half).all():
        raise RecipeError(f"{name}: {np.abs(rows).max():.6g} does not fit float16; give this weight bits 32")
    return half
