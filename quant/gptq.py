"""Codes column by column, errors taken up by the columns still to come (GPTQ, arXiv 2210.17323).

Dims: N rows, K columns (inputs), B blocks a row, S values a block.

    minimise  tr(dW H dW^T) = |dW L|^2,  dW = W - W_Q,  H [K, K] = sum of weight * x x^T over the tokens,  H = L L^T

L is lower triangular, so that column k of dW L depends on columns k and later of dW alone: columns are worked on from
the last to the first, each shifted so that it makes up for what the later ones err. (The paper goes from the first to
the last by U = chol(H^-1): U turned about is the inverse of L, which is the same and need not be computed.)

Order matters: columns with large activations go first, while there are others to take up their error. Blocks are taken
in the order of their activations, and columns within a block; each block's scale is fixed when its turn comes. That is
a permutation of the work alone: codes are stored in their own places, and running them costs nothing.
"""

# pyright: standard
# PyTorch tells only some of its types.

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..runtime.errors import CheckpointError
from .grid import Grid, best_grid, codes_by_rows, nearest_grid
from .recipe import WeightFormat
from .rtn import Codes

__all__ = ["Hessian", "factorize", "gptq_rows"]

_DAMPING = 0.01  # of the mean of H's diagonal, added to it, as in the authors' code
_VALUES_AT_ONCE = 1 << 15  # of a block's rows: what PyTorch works on in one thread, and a core's cache holds
_PANEL = 512  # columns whose shift by all later panels is one product of matrices


@dataclass(frozen=True)
class Hessian:
    """H of the inputs of some linears, ready for blocks of one size: L and the order of its columns.

    `order` [B * S] gives the column of the weight by the place in L; those beyond K are padding.
    """

    L: torch.Tensor  # float32 [B * S, B * S], of H in that order, damped
    order: torch.Tensor
    damping: float
    num_columns: int
    block_size: int


def factorize(held: list[torch.Tensor], block_size: int, *, name: str = "weight") -> Hessian:
    """Of H float32 [K, K], taken out of the list: two of its size are in memory at once, and it may be large.

    Raises CheckpointError naming `name` where a value is not finite.
    """
    H = held.pop()
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise CheckpointError(f"{name}: its inputs hold NaN or infinity; mend the checkpoint")
    num_columns = len(H)
    missing = -num_columns % block_size
    mean = float(H.diagonal().mean())
    if missing:
        H = torch.nn.functional.pad(H, (0, missing, 0, missing))
    order = _order(H.diagonal(), block_size)
    H = H[order]
    for rows in H.split(max(1, _VALUES_AT_ONCE // block_size)):
        rows.copy_(rows[:, order])
    more = damping = _DAMPING * mean if mean > 0 else 1.0
    H.diagonal().add_(more)
    L, info = torch.linalg.cholesky_ex(H)
    while int(info) > 0:  # float32 rounding can cost a nearly singular H its definiteness
        more, damping = 9 * damping, 10 * damping
        H.diagonal().add_(more)
        L, info = torch.linalg.cholesky_ex(H)
    return Hessian(L, order, damping, num_columns, block_size)


def gptq_rows(
    W_NK: torch.Tensor,
    hessian: Hessian,
    format: WeightFormat,
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Codes:
    """Codes of W float32 [N, K].

    A row never errs more, by H, than rounding to nearest: where it would, it is that. Raises CheckpointError naming
    `name` where a value is not finite.
    """
    if not bool(torch.isfinite(W_NK).all()):
        raise CheckpointError(f"{name}: holds NaN or infinity; mend the checkpoint")
    assert (hessian.num_columns, hessian.block_size) == (W_NK.shape[1], format.block_size)
    K, S = W_NK.shape[1], format.block_size

    def of_rows(rows: slice) -> tuple[torch.Tensor, Grid]:
        return _rows(torch.nn.functional.pad(W_NK[rows], (0, -K % S)), hessian, format, scale_dtype)

    return codes_by_rows(of_rows, W_NK.shape, S, _VALUES_AT_ONCE // S)


def _order(diagonal: torch.Tensor, S: int) -> torch.Tensor:
    """The last is worked on first: blocks by their activations, smallest first, and so the columns of each."""
    energy_BS = diagonal.unflatten(0, (-1, S))
    blocks = energy_BS.sum(-1).argsort(stable=True)
    within_BS = energy_BS.argsort(dim=-1, stable=True)
    return (blocks[:, None] * S + within_BS[blocks]).flatten()


def _rows(
    padded: torch.Tensor, hessian: Hessian, format: WeightFormat, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, Grid]:
    """Codes uint8 and the grid of some rows; rounding to nearest for those that err less by it."""
    plain = nearest_grid(padded.unflatten(1, (-1, format.block_size)), format, scale_dtype)
    nearest = plain.round(padded.unflatten(1, (-1, format.block_size)))
    of_plain = (padded - plain.values(nearest).flatten(1))[:, hessian.order]
    codes, grid, of_codes = _solve(padded[:, hessian.order], hessian, format, scale_dtype)
    codes = codes[:, torch.argsort(hessian.order)]
    worse = of_codes > _error(of_plain, hessian)
    codes[worse] = nearest.flatten(1)[worse].to(torch.uint8)
    grid.scales[worse], grid.zero_points[worse] = plain.scales[worse], plain.zero_points[worse]
    return codes, grid


def _solve(
    W: torch.Tensor, hessian: Hessian, format: WeightFormat, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """Codes uint8 [N, B * S] in the order of work, the grid in that of storage, and the error of each row by H [N].

    W [N, B * S] in the order of work is used up: what is left of it is dW.
    """
    (N, width), S, L = W.shape, format.block_size, hessian.L
    codes = torch.empty(N, width, dtype=torch.uint8)
    scales, zero_points = torch.empty(N, width // S), torch.empty(N, width // S)
    total = torch.zeros(N)
    blocks = (hessian.order[::S] // S).tolist()
    for panel in _backwards(width, _PANEL):
        shift = W[:, panel.stop :] @ L[panel.stop :, panel]
        for inside in _backwards(panel.stop - panel.start, S):
            span = slice(panel.start + inside.start, panel.start + inside.stop)
            later = slice(span.stop, panel.stop)
            # Shifted, the block would make up for all that later ones err, if it were not rounded.
            U = torch.linalg.solve_triangular(L[span, span], torch.eye(S), upper=False)
            values = torch.addmm(W[:, span], shift[:, inside] + W[:, later] @ L[later, span], U)
            grid = best_grid(values[:, None], format, L.diagonal()[span].square()[None], scale_dtype)
            block = blocks[span.start // S]
            scales[:, block], zero_points[:, block] = grid.scales[:, 0], grid.zero_points[:, 0]
            found, error = _round_block(values.T.contiguous(), U, grid)
            codes[:, span] = found.T
            W[:, span] -= ((found - grid.zero_points[:, 0]) * grid.scales[:, 0]).T
            total += error
    total -= hessian.damping * W.square().sum(1)
    return codes, Grid(scales, zero_points, 2**format.bits - 1), total


def _round_block(values_SN: torch.Tensor, U: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [S, N] of a block, and what each row errs [N]; values are used up."""
    scale, zero = grid.scales[:, 0], grid.zero_points[:, 0]
    inverse = U.diagonal().reciprocal().tolist()
    codes, total = torch.empty_like(values_SN), torch.zeros_like(scale)
    for column in range(len(U) - 1, -1, -1):
        value = values_SN[column]
        code = torch.div(value, scale, out=codes[column]).round_().add_(zero).clamp_(0, grid.top)
        error = value.sub_((code - zero).mul_(scale)).mul_(inverse[column])
        total.addcmul_(error, error)
        values_SN[:column].addr_(U[column, :column], error, alpha=-1)
    return codes, total


def _error(dW: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """The error of each row by H without its damping, [N]."""
    total = -hessian.damping * dW.square().sum(1)
    for panel in _backwards(dW.shape[1], _PANEL):
        total += (dW[:, panel.start :] @ hessian.L[panel.start :, panel]).square_().sum(1)
    return total


def _backwards(width: int, step: int) -> Iterator[slice]:
    """Slices of `step`, the last one first; a shorter one is the first."""
    for stop in range(width, 0, -step):
        yield slice(max(0, stop - step), stop)
