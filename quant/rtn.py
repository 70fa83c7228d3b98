"""Round to nearest: the codes of a weight, block by block along its rows.

Dims: N rows, K values a row, B blocks a row, S values a block.

    w ~ (code - zero_point) * scale        0 <= code <= 2**bits - 1

The range of a block always holds 0, so that 0 is stored exactly. Rows do not depend on one another: a weight may be
quantized in any chunks of rows.
"""

import numpy as np
import numpy.typing as npt

from ..runtime.errors import CheckpointError, RecipeError
from .recipe import WeightFormat

__all__ = ["Float32", "Uint8", "dequantize_rows", "num_blocks", "quantize_rows"]

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]

# Blocks with a smaller scale are stored as zeros: float kernels flush subnormals to zero anyway.
_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)


def num_blocks(num_columns: int, block_size: int) -> int:
    """Blocks of a row of `num_columns` values; the last one may be partial."""
    return -(-num_columns // block_size)


def quantize_rows(
    W_NK: Float32, format: WeightFormat, *, scale_dtype: str = "float32", name: str = "weight"
) -> tuple[Uint8, Float32, Uint8]:
    """Quantizes rows of a weight.

    W_NK: float32 [N, K]. Returns codes uint8 [N, B * block_size] (beyond K the zero point, which stands for 0),
    scales float32 [N, B] (exact in `scale_dtype`, "float32" or "float16") and zero points uint8 [N, B]. A value errs by
    half its scale at most. Raises CheckpointError naming `name` where a value is not finite, RecipeError where a scale
    does not fit `scale_dtype`.
    """
    N, K = W_NK.shape
    B = num_blocks(K, format.block_size)
    padded_NK = np.zeros((N, B * format.block_size), np.float32)
    padded_NK[:, :K] = W_NK  # the zeros beyond K do not widen a range that holds 0 anyway
    values_NBS = padded_NK.reshape(N, B, format.block_size)
    low_NB = np.minimum(_by_halves(values_NBS, np.minimum), 0).astype(np.float64)
    high_NB = np.maximum(_by_halves(values_NBS, np.maximum), 0).astype(np.float64)
    if not (np.isfinite(low_NB).all() and np.isfinite(high_NB).all()):
        raise CheckpointError(f"{name}: holds NaN or infinity, which cannot be quantized; mend the checkpoint")
    scale_NB, zero_NB = _scales(low_NB, high_NB, format, scale_dtype, name)
    # The steps work in place: a chunk of rows costs one float32 copy of itself, not five.
    np.divide(values_NBS, scale_NB[:, :, None], out=values_NBS)
    np.rint(values_NBS, out=values_NBS)
    np.add(values_NBS, zero_NB[:, :, None], out=values_NBS)
    np.clip(values_NBS, 0, 2**format.bits - 1, out=values_NBS)
    return padded_NK.astype(np.uint8), scale_NB, zero_NB.astype(np.uint8)


def dequantize_rows(codes_NK: Uint8, scales_NB: Float32, zero_points_NB: Uint8, num_columns: int) -> Float32:
    """What the kernels make of the three arrays of `quantize_rows`: float32 [N, num_columns]."""
    N, B = scales_NB.shape
    codes_NBS = codes_NK.reshape(N, B, -1).astype(np.float32)
    values_NBS = (codes_NBS - zero_points_NB[:, :, None]) * scales_NB[:, :, None]
    return values_NBS.reshape(N, -1)[:, :num_columns]


def _by_halves(values_NBS: Float32, choose: np.ufunc) -> Float32:
    """The minimum or maximum of each block, [N, B]; three times faster than a reduction over such a short axis."""
    while values_NBS.shape[2] > 1:
        half = values_NBS.shape[2] // 2
        values_NBS = choose(values_NBS[:, :, :half], values_NBS[:, :, half:])
    return values_NBS[:, :, 0]


def _scales(
    low_NB: npt.NDArray[np.float64],
    high_NB: npt.NDArray[np.float64],
    format: WeightFormat,
    scale_dtype: str,
    name: str,
) -> tuple[Float32, Float32]:
    """Scales and zero points (both float32 [N, B]) whose codes reach from low to high."""
    top = 2**format.bits - 1
    middle = 2 ** (format.bits - 1)
    if format.symmetric:
        exact_NB = np.maximum(-low_NB / middle, high_NB / (middle - 1))
    else:
        exact_NB = (high_NB - low_NB) / top
    if exact_NB.size and exact_NB.max() > np.finfo(scale_dtype).max:
        raise RecipeError(f"{name}: a scale of {exact_NB.max():.3g} does not fit {scale_dtype}; keep it in float")
    scale_NB = _round_up(exact_NB, scale_dtype)
    is_zero_NB = exact_NB < _SMALLEST_SCALE
    scale_NB[is_zero_NB] = 1.0
    if format.symmetric:
        return scale_NB, np.full_like(scale_NB, middle)
    zero_NB = np.rint(-low_NB / scale_NB)
    zero_NB[is_zero_NB] = 0
    return scale_NB, np.clip(zero_NB, 0, top).astype(np.float32)


def _round_up(exact_NB: npt.NDArray[np.float64], dtype: str) -> Float32:
    """To the next value of `dtype`: a scale that rounds down would clip the ends of its block."""
    rounded_NB = exact_NB.astype(dtype)
    short_NB = rounded_NB.astype(np.float64) < exact_NB
    rounded_NB[short_NB] = np.nextafter(rounded_NB[short_NB], np.array(np.inf, dtype))
    return rounded_NB.astype(np.float32)
