"""Bytes as the kernels want them.

Dims: N rows, K values a row, B blocks a row, S values a block.

com.microsoft.MatMulNBits            B uint8 [N, B, S * bits / 8], scales [N * B], zero_points uint8 [N * Z]
com.microsoft.GatherBlockQuantized   data uint8 [N, K * bits / 8], scales [N, B], zero_points uint8 [N, Z]
with Z = ceil(B * bits / 8)

Two 4-bit or four 2-bit codes share a byte, the first in the lowest bits. A row of zero points is padded to a whole byte
of its own, so each row of each array has its own bytes and a weight can be packed in any chunks of rows.
"""

from typing import Literal

import numpy as np

from ..runtime.errors import RecipeError
from .recipe import WeightFormat
from .rtn import Uint8, num_blocks

__all__ = [
    "Piece",
    "gather_shapes",
    "linear_shapes",
    "pack_codes",
    "pack_zero_points",
    "unpack_codes",
    "unpack_zero_points",
]

Piece = Literal["whole", "quantized", "scales", "zero_points"]  # a stored tensor holds one of these of a weight


def linear_shapes(num_rows: int, num_columns: int, format: WeightFormat) -> dict[Piece, tuple[int, ...]]:
    """Shapes of the initializers of MatMulNBits: "quantized", "scales" and, unless symmetric, "zero_points"."""
    blocks = num_blocks(num_columns, format.block_size)
    shapes: dict[Piece, tuple[int, ...]] = {
        "quantized": (num_rows, blocks, format.block_size * format.bits // 8),
        "scales": (num_rows * blocks,),
    }
    if not format.symmetric:
        shapes["zero_points"] = (num_rows * _row_bytes(blocks, format.bits),)
    return shapes


def gather_shapes(num_rows: int, num_columns: int, format: WeightFormat, name: str) -> dict[Piece, tuple[int, ...]]:
    """Shapes of the initializers of GatherBlockQuantized. Raises RecipeError where K values do not fill whole bytes."""
    if num_columns * format.bits % 8:
        raise RecipeError(
            f"{name}: rows of {num_columns} values do not fill whole bytes with {format.bits} bits; use 8"
        )
    blocks = num_blocks(num_columns, format.block_size)
    shapes: dict[Piece, tuple[int, ...]] = {
        "quantized": (num_rows, num_columns * format.bits // 8),
        "scales": (num_rows, blocks),
    }
    if not format.symmetric:
        shapes["zero_points"] = (num_rows, _row_bytes(blocks, format.bits))
    return shapes


def pack_codes(codes_NK: Uint8, format: WeightFormat, num_columns: int) -> Uint8:
    """Codes uint8 [N, num_columns or more] to bytes uint8 [N, num_columns * bits / 8]; drops those beyond."""
    codes_NK = codes_NK[:, :num_columns]
    if format.bits == 8:
        return np.ascontiguousarray(codes_NK)
    return _share_bytes(codes_NK, format.bits)


def pack_zero_points(zero_points_NB: Uint8, format: WeightFormat) -> Uint8:
    """Zero points uint8 [N, B] to bytes uint8 [N, ceil(B * bits / 8)]."""
    if format.bits == 8:
        return zero_points_NB
    missing = -zero_points_NB.shape[1] % (8 // format.bits)
    return _share_bytes(np.pad(zero_points_NB, ((0, 0), (0, missing))), format.bits)


def unpack_codes(bytes_NK: Uint8, bits: int) -> Uint8:
    """Bytes uint8 [N, K * bits / 8] back to codes uint8 [N, K]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (bytes_NK[..., None] >> shifts & (2**bits - 1)).reshape(len(bytes_NK), -1)


def unpack_zero_points(bytes_NB: Uint8, bits: int, num_blocks: int) -> Uint8:
    """Bytes of zero points back to uint8 [N, num_blocks], the padding of a row left out."""
    return unpack_codes(bytes_NB, bits)[:, :num_blocks]


def _share_bytes(codes_NK: Uint8, bits: int) -> Uint8:
    """Codes of 4 or 2 bits, as many a row as fill whole bytes."""
    codes_NK = np.ascontiguousarray(codes_NK)
    if bits == 4:
        both = codes_NK.view("<u2")  # the first code in the low byte, the second in the high one
        return (both | both >> 4).astype(np.uint8)
    four = codes_NK.view("<u4")
    return (four | four >> 6 | four >> 12 | four >> 18).astype(np.uint8)


def _row_bytes(num_values: int, bits: int) -> int:
    return -(-num_values * bits // 8)
