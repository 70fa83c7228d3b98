"""Codes of a weight by a robust norm, without any data (half-quadratic quantization, HQQ, Badri and Shaji 2023).

Dims: N rows, K values a row, B blocks a row, S values a block.

    minimise  sum |w - (code - zero_point) * scale| ** 0.7   of each block

Rounding to nearest spreads a block's codes over its whole range. Most weights lie in the middle of it, so a smaller
scale that clips the ends often errs less. The norm is split as in the paper: an error term e is found by shrinkage,
then scale and zero point fit w - e. Unlike the paper's, zero points are integers, as the fast kernels want them.
"""

import numpy as np

from .recipe import WeightFormat
from .rtn import Codes, Float32, num_blocks, quantize_rows, round_to

__all__ = ["hqq_rows"]

_NORM = 0.7
_NUM_STEPS = 20
_FIRST_BETA, _GROWTH = 10.0, 1.01  # of the quadratic penalty, as in the authors' code
_SHRINKS = (1.0, 0.9, 0.8, 0.7)  # scales to start from, in terms of rounding to nearest
_STRIP = 1 << 18  # values at work at once


def hqq_rows(W_NK: Float32, format: WeightFormat, *, scale_dtype: str = "float32", name: str = "weight") -> Codes:
    """As `quantize_rows`, whose codes a block keeps where they err less by the norm. Raises what that does."""
    codes_NK, scale_NB, zero_NB = quantize_rows(W_NK, format, scale_dtype=scale_dtype, name=name)
    (N, K), S = W_NK.shape, format.block_size
    B = num_blocks(K, S)
    step = max(1, _STRIP // (B * S))
    for rows in (slice(start, start + step) for start in range(0, N, step)):
        padded = np.zeros((len(W_NK[rows]), B * S), np.float32)
        padded[:, :K] = W_NK[rows]
        real = np.broadcast_to(np.arange(B * S).reshape(B, S) < K, (len(padded), B, S)).reshape(-1, S)
        codes, scale, zero = _improve(
            padded.reshape(-1, S),
            real,
            (codes_NK[rows].reshape(-1, S), scale_NB[rows].reshape(-1, 1), zero_NB[rows].reshape(-1, 1)),
            format,
            scale_dtype,
        )
        codes_NK[rows] = codes.reshape(-1, B * S)
        scale_NB[rows], zero_NB[rows] = scale.reshape(-1, B), zero.reshape(-1, B)
    return codes_NK, scale_NB, zero_NB


def _improve(values: Float32, real: np.ndarray, start: Codes, format: WeightFormat, scale_dtype: str) -> Codes:
    """Blocks as rows: values [M, S], of which `real` ones count; codes [M, S], scales and zero points [M, 1]."""
    top = 2**format.bits - 1
    codes, scale, zero = start[0].astype(np.float32), start[1].copy(), start[2].astype(np.float32)
    best = _norm(values, codes, scale, zero, real)
    found = (codes.copy(), scale.copy(), zero.copy())
    for shrink in _SHRINKS:
        scale, zero, beta = start[1] * np.float32(shrink), start[2].astype(np.float32), _FIRST_BETA
        for _ in range(_NUM_STEPS):
            codes = np.clip(np.rint(values / scale) + zero, 0, top)
            error = (values - (codes - zero) * scale).astype(np.float32, copy=False)
            target = values - _shrink(error, beta)
            if not format.symmetric:
                zero = np.clip(np.rint(np.mean(codes - target / scale, axis=1, keepdims=True)), 0, top)
            steps = codes - zero
            size = np.sum(steps * steps, axis=1, keepdims=True)
            fitted = np.sum(steps * target, axis=1, keepdims=True) / np.maximum(size, 1)
            usable = (size > 0) & (fitted > np.finfo(np.float32).smallest_normal)
            scale = np.where(usable, round_to(fitted, scale_dtype), scale).astype(np.float32)
            scale = np.where(scale > 0, scale, start[1])
            beta *= _GROWTH
        codes = np.clip(np.rint(values / scale) + zero, 0, top)
        norm = _norm(values, codes, scale, zero, real)
        better = norm < best
        best = np.where(better, norm, best)
        for kept, new in zip(found, (codes, scale, zero), strict=True):
            np.copyto(kept, new, where=better[:, None])
    codes = np.where(real, found[0], found[2])  # beyond K the zero point, which stands for 0
    return codes.astype(np.uint8), found[1], found[2].astype(np.uint8)


def _norm(values: Float32, codes: Float32, scale: Float32, zero: Float32, real: np.ndarray) -> Float32:
    """sum |error| ** 0.7 of each block, [M]."""
    error = np.abs(values - (codes - zero) * scale)
    return np.sum(np.where(real, error, 0) ** _NORM, axis=1)


def _shrink(error: Float32, beta: float) -> Float32:
    """The generalised soft threshold of |x| ** 0.7 (equation 5 of the paper)."""
    size = np.abs(error)
    threshold = np.where(size > 0, np.maximum(size, 1e-12) ** (_NORM - 1) / np.float32(beta), 0)
    return np.sign(error) * np.maximum(size - threshold, 0)
