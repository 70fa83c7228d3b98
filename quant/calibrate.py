"""Quantizes a stage of a role (a block, or what lies before or behind the blocks) from what flows through it.

Dims: T rows (tokens or patches) of a sample, K columns (inputs) of a linear, N its outputs.

A stage is handed over with its weights in memory and with samples that can be run through it any number of times.
What is found goes to a FoundRole; the stage is left with the weights that its codes stand for, so that the samples go
on from there as they will in use: later stages make up for the errors of earlier ones.
"""

# pyright: standard
# PyTorch tells only some of its types.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from .awq import blocks_of, fold_factors, nearest_weight
from .dynamic import dequantize_channels, quantize_channels
from .folds import Fold
from .found import FoundRole
from .gptq import Hessian, factorize, gptq_rows
from .grid import Grid, best_grid, codes_by_rows
from .hqq import hqq_rows
from .recipe import WeightFormat
from .rtn import Codes, Float32, dequantize_rows, num_blocks

__all__ = ["Stage", "quantize_stage"]

_PRODUCT_ROWS = 1024  # of the sum of x x^T, added to at once
_STRIP = 1 << 18  # values of a weight that awq's grids are searched for at once
_SEARCH_ROWS = 2048  # rows that the search for factors runs through a stage, for each of its candidates


class Stage(Protocol):
    """A part of a role, in memory. Parameters have the names that the role's graph gives them."""

    parameters: dict[str, torch.nn.Parameter]
    linears: dict[str, torch.nn.Module]  # by the name of the weight
    num_samples: int

    def run(self, sample: int) -> torch.Tensor:
        """The stage's output for a sample, [..., T, D]."""
        ...

    def row_weights(self, sample: int, num_rows: int) -> torch.Tensor:
        """How much each of the rows of a linear's input counts, [T]."""
        ...


@dataclass
class _Inputs:
    """What the input of some linears was like, added up over all rows by their weights."""

    size: torch.Tensor  # sum of weight * |x|, [K]
    # Sum of weight * x x^T: of all columns [1, K, K] for gptq, of blocks of columns [B, S, S] for awq alone.
    products: torch.Tensor
    total: float = 0.0  # sum of weights
    uses: set[tuple[bool, int]] = field(default_factory=set[tuple[bool, int]])  # whether gptq's, block size
    hessians: dict[int, Hessian] = field(default_factory=dict[int, Hessian])  # by block size

    @classmethod
    def of(cls, num_columns: int, span: int) -> "_Inputs":
        """Nothing yet, for blocks of `span` columns."""
        return cls(torch.zeros(num_columns), torch.zeros(num_blocks(num_columns, span), span, span))

    @property
    def is_whole(self) -> bool:
        """True where the products are those of all columns."""
        return self.products.shape[-1] == len(self.size)

    def add(self, rows_TK: torch.Tensor, weights_T: torch.Tensor) -> None:
        weighted = rows_TK * weights_T[:, None]
        self.size += weighted.abs().sum(0)
        self.total += float(weights_T.sum())
        if not self.is_whole:
            left, right = (blocks_of(x, self.products.shape[1]).transpose(0, 1) for x in (weighted, rows_TK))
            self.products.baddbmm_(left.transpose(1, 2), right)
            return
        for start in range(0, len(self.size), _PRODUCT_ROWS):  # what lies below the diagonal follows from the rest
            rows = slice(start, start + _PRODUCT_ROWS)
            self.products[0, rows, start:].addmm_(weighted[:, rows].T, rows_TK[:, start:])

    def complete(self) -> None:
        """Fills in what lies below the diagonal, when all has been added."""
        if self.is_whole:
            for start in range(0, len(self.size), _PRODUCT_ROWS):
                stop = start + _PRODUCT_ROWS
                self.products[0, stop:, start:stop] = self.products[0, start:stop, stop:].T

    def divide(self, columns_K: torch.Tensor) -> None:
        """By factors of the columns."""
        self.size /= columns_K
        num_beyond = self.products[..., 0].numel() - len(columns_K)
        columns = torch.nn.functional.pad(columns_K, (0, num_beyond), value=1.0).view(len(self.products), -1)
        self.products.div_(columns[:, :, None]).div_(columns[:, None])

    def blocks(self, block_size: int) -> torch.Tensor:
        """The products within each block, [B, S, S]."""
        found = torch.cat([_on_diagonal(part, block_size) for part in self.products])
        return found[: num_blocks(len(self.size), block_size)]

    def hessian(self, block_size: int, name: str) -> Hessian:
        """Ready for gptq, found once for all linears; what was added up goes where nobody else needs it."""
        if block_size not in self.hessians:
            self.uses.discard((True, block_size))
            held = [self.products[0].clone() if self.uses else self.products[0]]
            if not self.uses:
                self.products = torch.empty(0)
            self.hessians[block_size] = factorize(held, block_size, name=name)
        return self.hessians[block_size]


def quantize_stage(
    stage: Stage,
    formats: Mapping[str, WeightFormat],
    folds: Sequence[Fold],
    scale_dtype: str,
    found: FoundRole,
) -> None:
    """Finds codes of every linear of the stage whose format is calibrated; `formats` are by the name of the weight."""
    with torch.no_grad():
        needed = {name: formats[name] for name in stage.linears if name in formats and formats[name].is_calibrated}
        inputs = _observe(stage, needed)
        wanted = {name for name in needed if formats[name].method.startswith("awq")}
        folds = [fold for fold in folds if wanted.intersection(fold.readers) and _is_inside(fold, stage)]
        output_error = _OutputError(stage) if folds else None  # holds outputs
        for fold in folds:
            assert output_error is not None
            mean = _inputs_of(fold, inputs).size / max(_inputs_of(fold, inputs).total, 1e-12)
            factors_C = fold_factors(fold, stage.parameters, formats, mean, output_error)
            if factors_C is not None:
                _fold(fold, factors_C, stage, inputs, found)
        output_error = None
        for name in stage.linears:
            weight, format = stage.parameters[name], formats.get(name)
            if format is None or not format.is_quantized:
                continue
            if name in needed:
                entry = inputs.pop(name)  # with the last of its readers it goes: it can be the largest thing here
                codes = _find(weight.data, entry, format, scale_dtype, name)
                found.add_codes(name, codes, format)
                del entry
                weight.data = torch.from_numpy(dequantize_rows(*codes, weight.shape[1]))
            else:
                weight.data = _stands_for(weight.data, format)


def _observe(stage: Stage, needed: Mapping[str, WeightFormat]) -> dict[str, _Inputs]:
    """Inputs of the needed linears, by the name of their weight; those that read one value share an entry."""
    inputs: dict[str, _Inputs] = {}
    uses = {name: ("gptq" in format.method, format.block_size) for name, format in needed.items()}
    is_whole = any(whole for whole, _ in uses.values())
    largest = max((block_size for _, block_size in uses.values()), default=0)  # smaller blocks are parts of it
    at_work = 0
    seen: list[tuple[torch.Tensor, _Inputs]] = []  # inputs of this sample, so that each is added once

    def watch(name: str, x: torch.Tensor) -> None:
        for tensor, entry in seen:
            if tensor is x and inputs.setdefault(name, entry) is entry:
                return
        size = x.shape[-1]
        if name not in inputs:
            inputs[name] = _Inputs.of(size, size if is_whole else largest)
        rows = x.reshape(-1, size).to(torch.float32)
        inputs[name].add(rows, stage.row_weights(at_work, len(rows)))
        seen.append((x, inputs[name]))

    def watcher(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: watch(name, inputs[0])

    handles = [stage.linears[name].register_forward_pre_hook(watcher(name)) for name in needed]
    try:
        for at_work in range(stage.num_samples if needed else 0):
            seen.clear()
            stage.run(at_work)
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()
    missing = sorted(needed.keys() - inputs.keys())
    assert not missing, f"{missing[0]}: no sample went through it"
    for name, entry in inputs.items():
        if not entry.uses:
            entry.complete()
        entry.uses.add(uses[name])
    return inputs


def _is_inside(fold: Fold, stage: Stage) -> bool:
    """True where the stage holds all of a fold."""
    return all(name in stage.parameters for name in (*fold.readers, *(rows.parameter for rows in fold.writers)))


def _inputs_of(fold: Fold, inputs: Mapping[str, _Inputs]) -> _Inputs:
    return next(inputs[name] for name in fold.readers if name in inputs)


def _fold(fold: Fold, factors_C: torch.Tensor, stage: Stage, inputs: Mapping[str, _Inputs], found: FoundRole) -> None:
    """Applies factors to the stage, to what was observed and to `found`."""
    columns = factors_C[torch.from_numpy(fold.channels)]
    for name in fold.readers:
        stage.parameters[name].data *= columns
        _multiply(found.factors.column_factors, name, columns)
    _inputs_of(fold, inputs).divide(columns)
    for rows in fold.writers:
        parameter = stage.parameters[rows.parameter]
        inverse = torch.ones(len(parameter))
        inverse[rows.start : rows.start + len(factors_C)] = 1 / factors_C
        if parameter.dim() == 1:
            parameter.data *= inverse
            found.factors.vectors[rows.parameter] = parameter.data.numpy().copy()
        else:
            parameter.data *= inverse[:, None]
            _multiply(found.factors.row_factors, rows.parameter, inverse)


def _multiply(factors: dict[str, Float32], name: str, more: torch.Tensor) -> None:
    before = factors.get(name)
    factors[name] = more.numpy().copy() if before is None else before * more.numpy()


class _OutputError:
    """Weighted squared error of the stage's output, on some samples, against what it gave when this was made."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._expected: dict[int, torch.Tensor] = {}
        num_rows = 0
        for sample in range(stage.num_samples):
            self._expected[sample] = self._run(sample)
            num_rows += len(self._expected[sample])
            if num_rows >= _SEARCH_ROWS:
                break

    def __call__(self) -> float:
        total = 0.0
        for sample, expected in self._expected.items():
            error = (self._run(sample) - expected).pow_(2).sum(-1)
            total += float((error * self._stage.row_weights(sample, len(expected))).sum())
        return total

    def _run(self, sample: int) -> torch.Tensor:
        output = self._stage.run(sample)
        return output.reshape(-1, output.shape[-1])


def _find(weight: torch.Tensor, inputs: _Inputs, format: WeightFormat, scale_dtype: str, name: str) -> Codes:
    """Codes of a weight by its method, factors being applied already."""
    dtype: torch.dtype = getattr(torch, scale_dtype)
    if "gptq" in format.method:
        return gptq_rows(weight, inputs.hessian(format.block_size, name), format, scale_dtype=dtype, name=name)
    importance = inputs.blocks(format.block_size)

    def of_rows(rows: slice) -> tuple[torch.Tensor, Grid]:
        blocks = blocks_of(weight[rows], format.block_size)
        grid = best_grid(blocks, format, importance, dtype)
        return grid.round(blocks).flatten(1), grid

    return codes_by_rows(of_rows, weight.shape, format.block_size, _STRIP // weight.shape[1])


def _on_diagonal(products: torch.Tensor, block_size: int) -> torch.Tensor:
    """What lies on the diagonal of a matrix [K, K], block by block: [B, S, S]."""
    missing = -len(products) % block_size
    padded = torch.nn.functional.pad(products, (0, missing, 0, missing))
    blocks = padded.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _stands_for(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """The weight that codes found without data stand for."""
    if format.is_dynamic:
        return torch.from_numpy(dequantize_channels(*quantize_channels(_array(weight))))
    if format.method == "hqq":
        return torch.from_numpy(dequantize_rows(*hqq_rows(_array(weight), format), weight.shape[1]))
    return nearest_weight(weight, format)


def _array(weight: torch.Tensor) -> Float32:
    return np.ascontiguousarray(weight.numpy())
