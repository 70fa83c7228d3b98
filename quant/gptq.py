"""Codes column by column, errors taken up by the columns still to come (GPTQ, arXiv 2210.17323).

Dims: N rows, K columns (inputs), B blocks a row, S values a block.

    minimise  tr(dW H dW^T),  dW = W - W_Q,  H [K, K] = sum of weight * x x^T over the calibration tokens

With H^-1 = U^T U, U upper triangular, rounding column k by the error e_k = dW_k / U_kk changes later columns by
-e_k U_k, and the sum of all e_k^2 is the error that is left.

Order matters: columns with large activations go first, while there are others to take up their error. Blocks are taken
in the order of their activations, and columns within a block; each block's scale is fixed when its turn comes. That is
a permutation of the work alone: codes are stored in their own places, and running them costs nothing.
"""

# pyright: standard
# PyTorch tells only some of its types.

import numpy as np
import torch

from ..runtime.errors import CheckpointError
from .grid import Grid, best_grid, nearest_grid
from .recipe import WeightFormat
from .rtn import Codes, num_blocks

__all__ = ["gptq_rows"]

_DAMPING = 0.01  # of the mean of H's diagonal, added to it, as in the authors' code
_ROWS_AT_ONCE = 1 << 25  # values of a weight that are worked on at once


def gptq_rows(
    W_NK: torch.Tensor,
    H_KK: torch.Tensor,
    format: WeightFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Codes:
    """Codes of W float32 [N, K] under H float32 [K, K]; H is used up.

    A row never errs more, by H, than rounding to nearest: where it would, it is that. Raises CheckpointError naming
    `name` where a value is not finite.
    """
    if not bool(torch.isfinite(W_NK).all()) or not bool(torch.isfinite(H_KK.diagonal()).all()):
        raise CheckpointError(f"{name}: it or its inputs hold NaN or infinity; mend the checkpoint")
    (N, K), S = W_NK.shape, format.block_size
    B = num_blocks(K, S)
    H = torch.zeros(B * S, B * S)
    H[:K, :K] = H_KK
    del H_KK
    mean = float(H.diagonal()[:K].mean())
    order = _order(H, S)
    U = _inverse_factor(H[order][:, order], _DAMPING * mean if mean > 0 else 1.0)
    codes = np.empty((N, B * S), np.uint8)
    scales, zero_points = np.empty((N, B), np.float32), np.empty((N, B), np.uint8)
    step = max(1, _ROWS_AT_ONCE // (B * S))
    for rows in (slice(start, min(start + step, N)) for start in range(0, N, step)):
        padded = torch.zeros(rows.stop - rows.start, B * S)
        padded[:, :K] = W_NK[rows]
        found, grid = _solve(padded[:, order], U, format, scale_dtype, order[::S] // S)
        found = found[:, torch.argsort(order)]
        plain = nearest_grid(padded.unflatten(1, (B, S)), format, scale_dtype)
        _keep_better(padded, H, found, grid, plain)
        codes[rows] = found.to(torch.uint8).numpy()
        scales[rows], zero_points[rows] = grid.scales.numpy(), grid.zero_points.to(torch.uint8).numpy()
    return codes, scales, zero_points


def _order(H: torch.Tensor, S: int) -> torch.Tensor:
    """Columns in the order of work: blocks by their activations, largest first, and so the columns of each."""
    energy_BS = H.diagonal().unflatten(0, (-1, S))
    blocks = energy_BS.sum(-1).argsort(descending=True, stable=True)
    within_BS = energy_BS.argsort(dim=-1, descending=True, stable=True)
    return (blocks[:, None] * S + within_BS[blocks]).flatten()


def _inverse_factor(H: torch.Tensor, damping: float) -> torch.Tensor:
    """U upper triangular with H^-1 = U^T U; H is changed.

    With H = R R^T, R upper triangular (a Cholesky factor of H turned about), U is the inverse of R: half the work of
    inverting H first.
    """
    H.diagonal().add_(damping)
    turned, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    while int(info) > 0:  # float32 rounding can cost a nearly singular H its definiteness
        damping *= 10
        H.diagonal().add_(damping)
        turned, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    R = turned.flip(0, 1)
    del turned
    return torch.linalg.solve_triangular(R, torch.eye(len(R)), upper=True)


def _solve(
    W: torch.Tensor, U: torch.Tensor, format: WeightFormat, scale_dtype: torch.dtype, blocks: torch.Tensor
) -> tuple[torch.Tensor, Grid]:
    """Codes [N, B * S] in the order of work, and the grid in that of storage; `blocks` [B] is the order of blocks."""
    N, S = len(W), format.block_size
    codes = torch.empty_like(W)
    scales, zero_points = torch.empty(N, len(blocks)), torch.empty(N, len(blocks))
    top = 2**format.bits - 1
    for turn, block in enumerate(blocks.tolist()):
        span = slice(turn * S, (turn + 1) * S)
        values, diagonal = W[:, span], U.diagonal()[span]
        grid = best_grid(values[:, None], format, diagonal.pow(-2)[None], scale_dtype)
        scales[:, block], zero_points[:, block] = grid.scales[:, 0], grid.zero_points[:, 0]
        scale, zero = grid.scales[:, 0], grid.zero_points[:, 0]
        errors = torch.empty(N, S)
        U_SS = U[span, span]
        for column in range(S):
            value = values[:, column]
            code = (torch.round(value / scale) + zero).clamp_(0, top)
            codes[:, turn * S + column] = code
            error = (value - (code - zero) * scale) / diagonal[column]
            errors[:, column] = error
            values[:, column:] -= error[:, None] * U_SS[column, column:]
        W[:, span.stop :] -= errors @ U[span, span.stop :]
    return codes, Grid(scales, zero_points, top)


def _keep_better(W: torch.Tensor, H: torch.Tensor, codes: torch.Tensor, grid: Grid, plain: Grid) -> None:
    """Puts rounding to nearest, in place, where a row errs less by it."""
    blocks = (len(grid.scales[0]), -1)
    nearest = plain.round(W.unflatten(1, blocks))
    of_codes = W - grid.values(codes.unflatten(1, blocks)).flatten(1)
    of_plain = W - plain.values(nearest).flatten(1)
    worse = ((of_codes @ H) * of_codes).sum(1) > ((of_plain @ H) * of_plain).sum(1)
    codes[worse] = nearest.flatten(1)[worse]
    grid.scales[worse], grid.zero_points[worse] = plain.scales[worse], plain.zero_points[worse]
