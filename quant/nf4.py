"""4-bit values out of a table: NF4 and FP4 (QLoRA, arXiv 2305.14314), in the layout of bitsandbytes.

Dims: N rows, K values a row, S values a block, B = ceil(N * K / S) blocks.

com.microsoft.MatMulBnb4    B uint8 [ceil(N * K / 2)], absmax [B]
    w ~ table[code] * absmax       absmax: the largest |w| of the block

Blocks run over the flattened weight, from row to row; two codes share a byte, the first in the high half. NF4's values
are quantiles of a normal distribution, FP4's a sign, two bits of exponent and one of mantissa.
"""

import math
from typing import Literal

import numpy as np

from ..runtime.errors import CheckpointError
from .pack import Piece
from .rtn import Float32, Uint8

__all__ = ["TABLES", "TableName", "dequantize_flat", "flat_shapes", "quantize_flat", "whole_rows"]

TableName = Literal["nf4", "fp4"]
TABLES: dict[TableName, Float32] = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    ),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32)
    / np.float32(12),
}
_SMALLEST = np.float32(1e-38)  # of a divisor; a block of zeros has absmax 0


def flat_shapes(num_rows: int, num_columns: int, block_size: int) -> dict[Piece, tuple[int, ...]]:
    """Shapes of the initializers: "quantized" and "scales"."""
    count = num_rows * num_columns
    return {"quantized": (-(-count // 2),), "scales": (-(-count // block_size),)}


def whole_rows(num_columns: int, block_size: int) -> int:
    """The number of rows that fill whole blocks: a weight may be quantized in chunks of so many."""
    return block_size // math.gcd(num_columns, block_size)


def quantize_flat(W_NK: Float32, table: TableName, block_size: int, *, name: str = "weight") -> tuple[Uint8, Float32]:
    """Packed codes uint8 [ceil(N * K / 2)] and absmax float32 [B] of rows, the nearest value of the table each.

    A value errs by half the widest gap of the table times absmax at most. Raises CheckpointError naming `name` where a
    value is not finite.
    """
    flat = np.ascontiguousarray(W_NK).reshape(-1)
    count, num_blocks = flat.size, -(-flat.size // block_size)
    if num_blocks * block_size != count:
        flat = np.pad(flat, (0, num_blocks * block_size - count))
    values_BS = flat.reshape(num_blocks, block_size)
    absmax_B = np.abs(values_BS).max(axis=1, initial=0)
    if not np.isfinite(absmax_B).all():
        raise CheckpointError(f"{name}: holds NaN or infinity, which cannot be quantized; mend the checkpoint")
    scaled = (values_BS * (np.float32(1) / np.maximum(absmax_B, _SMALLEST))[:, None]).reshape(-1)
    order = np.argsort(TABLES[table], kind="stable")
    sorted_values = TABLES[table][order]
    middles = (sorted_values[:-1] + sorted_values[1:]) / np.float32(2)
    codes: Uint8 = order.astype(np.uint8)[np.searchsorted(middles, scaled[: count + count % 2])]
    packed: Uint8 = np.left_shift(codes[::2], 4) | codes[1::2]
    return packed, absmax_B


def dequantize_flat(packed: Uint8, absmax: Float32, table: TableName, block_size: int) -> Float32:
    """What the kernel makes of codes from the beginning of a block on: float32 [2 * len(packed)]."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    scales: Float32 = np.repeat(absmax, block_size)
    values = np.zeros(len(codes), np.float32)
    count = min(len(codes), len(scales))
    np.multiply(TABLES[table][codes[:count]], scales[:count], out=values[:count])
    return values
