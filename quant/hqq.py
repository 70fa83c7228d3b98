"""Codes of a weight by a robust norm, without any data (half-quadratic quantization, HQQ, Badri and Shaji 2023).

Dims: N rows, K values a row, B blocks a row, S values a block.

    minimise  sum |w - (code - zero_point) * scale| ** 0.7   of each block

Rounding to nearest spreads a block's codes over its whole range. Most weights lie in the middle of it, so a smaller
scale that clips the ends often errs less. The norm is split as in the paper: an error term e is found by shrinkage,
then scale and zero point fit w - e. Unlike the paper's, zero points are integers, as the fast kernels want them, and
steps go on from the best of a few scales and of all steps so far. With 2 bits scales stay those of rounding, as in the
paper: smaller ones pull all large weights towards zero, which costs answers more than the norm tells.
"""

import numpy as np

from .recipe import WeightFormat
from .rtn import Codes, Float32, num_blocks, quantize_rows, round_to

__all__ = ["hqq_rows"]

_NORM = 0.7
_NUM_STEPS = 12  # at most
_CLEAR = 1e-3  # of a block's norm; steps end where none gains as much
_FIRST_BETA, _GROWTH = 10.0, 1.01  # of the quadratic penalty, as in the authors' code
_SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # scales to start from, in terms of rounding to nearest
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
        real = np.tile((np.arange(B * S) < K).reshape(B, S).T, len(padded))
        start = (codes_NK[rows].reshape(-1, S).T, scale_NB[rows].reshape(-1), zero_NB[rows].reshape(-1))
        values = np.ascontiguousarray(padded.reshape(-1, S).T)  # numpy's loops then run over all blocks at once
        codes, scale, zero = _improve(values, real, start, format, scale_dtype)
        codes_NK[rows] = codes.T.reshape(-1, B * S)
        scale_NB[rows], zero_NB[rows] = scale.reshape(-1, B), zero.reshape(-1, B)
    return codes_NK, scale_NB, zero_NB


def _improve(values: Float32, real: np.ndarray, start: Codes, format: WeightFormat, scale_dtype: str) -> Codes:
    """Blocks as columns: values [S, M], of which `real` ones count; codes [S, M], scales and zero points [M]."""
    top = 2**format.bits - 1
    codes, scale, zero = (part.astype(np.float32) for part in start)
    best = _Best(values, real, codes, scale, zero)
    moves_scale = format.bits > 2
    for shrink in _SHRINKS if moves_scale else ():
        smaller = round_to(scale * np.float32(shrink), scale_dtype)
        smaller = np.where(smaller > 0, smaller, scale)
        best.offer(_round(values, smaller, zero, top), smaller, zero)
    beta = _FIRST_BETA
    for _ in range(_NUM_STEPS):
        codes, scale, zero = best.codes, best.scale, best.zero
        target = values - _shrink(values - (codes - zero) * scale, beta)
        if not format.symmetric:
            zero = np.clip(np.rint(np.mean(codes - target / scale, axis=0)), 0, top)
        steps = codes - zero
        size = np.sum(steps * steps, axis=0)
        fitted = round_to(np.sum(steps * target, axis=0) / np.maximum(size, 1), scale_dtype)
        scale = np.where(moves_scale & (size > 0) & (fitted > np.finfo(np.float32).smallest_normal), fitted, scale)
        if not best.offer(_round(values, scale, zero, top), scale, zero):
            break
        beta *= _GROWTH
    codes = np.where(real, best.codes, best.zero)  # beyond K the zero point, which stands for 0
    return codes.astype(np.uint8), best.scale, best.zero.astype(np.uint8)


class _Best:
    """The codes with the least norm so far, block by block, that err no more by squares than those it began with.

    Without that, a norm below 1 gives up a few large values for many small ones, and large weights matter.
    """

    def __init__(self, values: Float32, real: np.ndarray, codes: Float32, scale: Float32, zero: Float32) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self._values, self._real = values, real
        self._norm, self._squares = self._norms(codes, scale, zero)

    def offer(self, codes: Float32, scale: Float32, zero: Float32) -> bool:
        """Takes what is better. False where nothing is by more than a thousandth."""
        norm, squares = self._norms(codes, scale, zero)
        better = (norm < self._norm) & (squares <= self._squares)
        is_clear = bool((norm < (1 - _CLEAR) * self._norm)[better].any())
        self._norm = np.where(better, norm, self._norm)
        self.scale, self.zero = np.where(better, scale, self.scale), np.where(better, zero, self.zero)
        self.codes = np.where(better, codes, self.codes)
        return is_clear

    def _norms(self, codes: Float32, scale: Float32, zero: Float32) -> tuple[Float32, Float32]:
        """sum |error| ** 0.7 of each block, and of squares, [M]."""
        error = np.where(self._real, np.abs(self._values - (codes - zero) * scale), np.float32(0))
        return np.sum(error ** np.float32(_NORM), axis=0), np.sum(error * error, axis=0)


def _round(values: Float32, scale: Float32, zero: Float32, top: int) -> Float32:
    codes = np.rint(values / scale)
    codes += zero
    return np.clip(codes, 0, top, out=codes)


def _shrink(error: Float32, beta: float) -> Float32:
    """The generalised soft threshold of |x| ** 0.7 (equation 5 of the paper)."""
    size = np.abs(error)
    threshold = np.where(size > 0, np.maximum(size, 1e-12) ** (_NORM - 1) / np.float32(beta), 0)
    return np.sign(error) * np.maximum(size - threshold, 0)
