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

__all__ = ["Codes", "Float32", "Uint8", "dequantize_rows", "num_blocks", "quantize_rows", "round_to"]

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
# Codes uint8 [N, B * S] (beyond K the zero point), scales float32 [N, B], zero points uint8 [N, B].
Codes = tuple[Uint8, Float32, Uint8]

# Blocks with a smaller scale are stored as zeros: float kernels flush subnormals to zero anyway.
_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)
_STRIP = 1 << 18  # values at work at once: a megabyte of float32 stays in a core's cache


def num_blocks(num_columns: int, block_size: int) -> int:
    """Blocks of a row of `num_columns` values; the last one may be partial."""
    return -(-num_columns // block_size)


def quantize_rows(W_NK: Float32, format: WeightFormat, *, scale_dtype: str = "float32", name: str = "weight") -> Codes:
    """Quantizes rows of a weight.

    W_NK: float32 [N, K]. Returns codes uint8 [N, B * block_size] (beyond K the zero point, which stands for 0),
    scales float32 [N, B] (exact in `scale_dtype`, "float32" or "float16") and zero points uint8 [N, B]. A value errs by
    half its scale at most. Raises CheckpointError naming `name` where a value is not finite, RecipeError where a scale
    does not fit `scale_dtype`.
    """
    N, K = W_NK.shape
    B, S = num_blocks(K, format.block_size), format.block_size
    codes_NK = np.empty((N, B * S), np.uint8)
    scale_NB = np.empty((N, B), np.float32)
    zero_NB = np.empty((N, B), np.uint8)
    step = max(1, _STRIP // (B * S))
    for rows in (slice(start, start + step) for start in range(0, N, step)):
        _quantize_strip(W_NK[rows], format, scale_dtype, name, codes_NK[rows], scale_NB[rows], zero_NB[rows])
    return codes_NK, scale_NB, zero_NB


def _quantize_strip(
    W_NK: Float32,
    format: WeightFormat,
    scale_dtype: str,
    name: str,
    codes_NK: Uint8,
    scale_NB: Float32,
    zero_NB: Uint8,
) -> None:
    """Quantizes rows that fit the caches into the three arrays.

    It works on blocks as columns, [S, N * B]: numpy's loops then run over all blocks at once, not over the few values
    of one, which is twice as fast, the two transpositions included.
    """
    (N, K), B, S = W_NK.shape, scale_NB.shape[1], format.block_size
    whole_NK = W_NK
    if B * S != K:
        whole_NK = np.zeros((N, B * S), np.float32)
        whole_NK[:, :K] = W_NK  # the zeros beyond K do not widen a range that holds 0 anyway
    values = np.empty((S, N * B), np.float32)
    np.copyto(values, whole_NK.reshape(N * B, S).T)
    low = np.minimum(np.minimum.reduce(values), 0).astype(np.float64)
    high = np.maximum(np.maximum.reduce(values), 0).astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CheckpointError(f"{name}: holds NaN or infinity, which cannot be quantized; mend the checkpoint")
    scale, zero = _scales(low, high, format, scale_dtype, name)
    np.divide(values, scale, out=values)
    np.rint(values, out=values)
    np.add(values, zero, out=values)
    np.clip(values, 0, 2**format.bits - 1, out=values)
    np.copyto(codes_NK.reshape(N * B, S), values.astype(np.uint8).T)
    scale_NB[:] = scale.reshape(N, B)
    zero_NB[:] = zero.astype(np.uint8).reshape(N, B)


def dequantize_rows(codes_NK: Uint8, scales_NB: Float32, zero_points_NB: Uint8, num_columns: int) -> Float32:
    """What the kernels make of the three arrays of `quantize_rows`: float32 [N, num_columns]."""
    N, B = scales_NB.shape
    codes_NBS = codes_NK.reshape(N, B, -1).astype(np.float32)
    values_NBS = (codes_NBS - zero_points_NB[:, :, None]) * scales_NB[:, :, None]
    return values_NBS.reshape(N, -1)[:, :num_columns]


def _scales(
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    format: WeightFormat,
    scale_dtype: str,
    name: str,
) -> tuple[Float32, Float32]:
    """Scales and zero points (both float32) of blocks whose codes reach from low to high."""
    top = 2**format.bits - 1
    middle = 2 ** (format.bits - 1)
    if format.symmetric:
        exact = np.maximum(-low / middle, high / (middle - 1))
    else:
        exact = (high - low) / top
    if exact.size and exact.max() > np.finfo(scale_dtype).max:
        raise RecipeError(f"{name}: a scale of {exact.max():.3g} does not fit {scale_dtype}; keep it in float")
    scale = _round_up(exact, scale_dtype)
    is_zero = exact < _SMALLEST_SCALE
    scale[is_zero] = 1.0
    if format.symmetric:
        return scale, np.full_like(scale, middle)
    zero = np.rint(-low / scale)
    zero[is_zero] = 0
    return scale, np.clip(zero, 0, top).astype(np.float32)


def _round_up(exact: npt.NDArray[np.float64], dtype: str) -> Float32:
    """To the next value of `dtype`: a scale that rounds down would clip the ends of its block."""
    rounded = exact.astype(dtype)
    short = rounded.astype(np.float64) < exact
    # Numbers above zero stand in the order of their bits, so the next one is one further.
    rounded.view(f"u{rounded.itemsize}")[:] += short
    return rounded.astype(np.float32)


def round_to(values: Float32, dtype: str) -> Float32:
    """The nearest values of `dtype`, "float32" or "float16", as float32."""
    return values.astype(dtype).astype(np.float32)
