"""Blocks of codes in torch, rounding to nearest with any scale, and the scale of a block that errs least.

Dims: N rows, B blocks a row, S values a block.

Calibration tries many scales on many cores; what it settles on is what `quantize_rows` would give where no scale is
better than that of rounding to nearest.
"""

# pyright: standard
# PyTorch tells only some of its types.

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .recipe import WeightFormat
from .rtn import Codes, num_blocks

__all__ = ["Grid", "best_grid", "codes_by_rows", "nearest_grid"]

_NUM_SHRINKS = 12
_SHRINK_STEP = 0.05  # the smallest scale tried is 0.4 of that which covers the block
_SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


@dataclass(frozen=True)
class Grid:
    """The values that codes of a block can stand for: scales and zero points float32 [N, B]."""

    scales: torch.Tensor
    zero_points: torch.Tensor
    top: int

    def round(self, values_NBS: torch.Tensor) -> torch.Tensor:
        """The nearest codes, float32 [N, B, S]."""
        codes = torch.round(values_NBS / self.scales[..., None]) + self.zero_points[..., None]
        return codes.clamp_(0, self.top)

    def values(self, codes_NBS: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        return (codes_NBS - self.zero_points[..., None]) * self.scales[..., None]

    def nearest(self, values_NBS: torch.Tensor) -> torch.Tensor:
        """The nearest values of the grid."""
        return self.values(self.round(values_NBS))


def nearest_grid(
    values_NBS: torch.Tensor, format: WeightFormat, scale_dtype: torch.dtype = torch.float32, shrink: float = 1.0
) -> Grid:
    """The grid that covers a block, and 0, or a `shrink` of it, whose ends are clipped."""
    top, middle = 2**format.bits - 1, 2 ** (format.bits - 1)
    low = values_NBS.amin(-1).clamp_(max=0) * shrink
    high = values_NBS.amax(-1).clamp_(min=0) * shrink
    exact = torch.maximum(-low / middle, high / (middle - 1)) if format.symmetric else (high - low) / top
    scales = _round_up(exact, scale_dtype)
    is_zero = exact < _SMALLEST_SCALE
    scales[is_zero] = 1.0
    if format.symmetric:
        return Grid(scales, torch.full_like(scales, middle), top)
    zero_points = torch.round(-low / scales).clamp_(0, top)
    zero_points[is_zero] = 0
    return Grid(scales, zero_points, top)


def codes_by_rows(
    find: Callable[[slice], tuple[torch.Tensor, Grid]], shape: Sequence[int], block_size: int, num_rows: int
) -> Codes:
    """Codes of a weight [N, K], `num_rows` rows at a time on all cores: those that `find` gives, [., B * S], and grids.

    Rows do not depend on one another. A thread to each strip waits for nobody, where threads within each of PyTorch's
    many small operations would wait for one another at the end of every one.
    """
    (N, K), step = shape, max(1, num_rows)
    B = num_blocks(K, block_size)
    codes = np.empty((N, B * block_size), np.uint8)
    scales, zero_points = np.empty((N, B), np.float32), np.empty((N, B), np.uint8)

    def strip(start: int) -> None:
        rows = slice(start, min(start + step, N))
        with torch.no_grad():  # which is said thread by thread
            found, grid = find(rows)
        codes[rows] = found.to(torch.uint8).numpy()
        scales[rows], zero_points[rows] = grid.scales.numpy(), grid.zero_points.to(torch.uint8).numpy()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(strip, range(0, N, step)):
            pass
    return codes, scales, zero_points


def best_grid(
    values_NBS: torch.Tensor,
    format: WeightFormat,
    importance: torch.Tensor,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:
    """The shrink of each block's grid with the least sum of importance * error^2; importance [B, S].

    Or the least e^T importance e, e the errors of a block: importance [B, S, S].
    """
    best = nearest_grid(values_NBS, format, scale_dtype)
    least = _error(best, values_NBS, importance)
    for step in range(1, _NUM_SHRINKS + 1):
        grid = nearest_grid(values_NBS, format, scale_dtype, 1 - step * _SHRINK_STEP)
        error = _error(grid, values_NBS, importance)
        better = error < least
        least = torch.where(better, error, least)
        best.scales[better], best.zero_points[better] = grid.scales[better], grid.zero_points[better]
    return best


def _error(grid: Grid, values_NBS: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    error = values_NBS - grid.nearest(values_NBS)
    if importance.dim() == 2:
        return (error.pow_(2) * importance).sum(-1)
    return (torch.einsum("nbs,bst->nbt", error, importance) * error).sum(-1)


def _round_up(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the next value of `dtype`, as in quant/rtn.py: a scale that rounds down would clip the ends of its block."""
    rounded = exact.to(dtype)
    short = rounded.to(torch.float32) < exact
    up = torch.nextafter(rounded, torch.full_like(rounded, float("inf"))) if short.any() else rounded
    return torch.where(short, up, rounded).to(torch.float32)
