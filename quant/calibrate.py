"""Quantizes a stage of a role (a block, or what lies before or behind the blocks) from what flows through it.

Dims: T rows (tokens or patches) of a sample, K columns (inputs) of a linear, N its outputs.

A stage is handed over with its weights in memory and with samples that can be run through it any number of times.
What is found goes to a FoundRole; the stage is left with the weights that its codes stand for, so that the samples go
on from there as they will in use: later stages make up for the errors of earlier ones.
"""

# pyright: standard
# PyTorch tells only some of its types.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .awq import blocks_of, fold_factors, nearest_weight
from .dynamic import dequantize_channels, quantize_channels
from .folds import Fold
from .found import FoundRole
from .gptq import gptq_rows
from .grid import best_grid
from .hqq import hqq_rows
from .recipe import WeightFormat
from .rtn import Codes, Float32, dequantize_rows

__all__ = ["Stage", "quantize_stage"]

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
    hessian: torch.Tensor  # sum of weight * x x^T, [K, K]
    total: float = 0.0  # sum of weights


def quantize_stage(
    stage: Stage,
    formats: Mapping[str, WeightFormat],
    folds: Sequence[Fold],
    scale_dtype: str,
    found: FoundRole,
) -> None:
    """Finds codes of every linear of the stage whose format is calibrated; `formats` are by the name of the weight."""
    with torch.no_grad():
        needed = {name for name in stage.linears if name in formats and formats[name].is_calibrated}
        inputs = _observe(stage, needed)
        wanted = {name for name in needed if formats[name].method.startswith("awq")}
        folds = [fold for fold in folds if wanted.intersection(fold.readers) and _is_inside(fold, stage)]
        output_error = _OutputError(stage) if folds else None
        for fold in folds:
            assert output_error is not None
            mean = _inputs_of(fold, inputs).size / max(_inputs_of(fold, inputs).total, 1e-12)
            factors_C = fold_factors(fold, stage.parameters, formats, mean, output_error)
            if factors_C is not None:
                _fold(fold, factors_C, stage, inputs, found)
        for name in stage.linears:
            weight, format = stage.parameters[name], formats.get(name)
            if format is None or not format.is_quantized:
                continue
            if name in needed:
                codes = _find(weight.data, inputs[name], format, scale_dtype, name)
                found.add_codes(name, codes, format)
                weight.data = torch.from_numpy(dequantize_rows(*codes, weight.shape[1]))
            else:
                weight.data = _stands_for(weight.data, format)


def _observe(stage: Stage, needed: set[str]) -> dict[str, _Inputs]:
    """Inputs of the needed linears, by the name of their weight; those that read one value share an entry."""
    inputs: dict[str, _Inputs] = {}
    at_work = 0
    seen: list[tuple[torch.Tensor, _Inputs]] = []  # inputs of this sample, so that each is added once

    def watch(name: str, x: torch.Tensor) -> None:
        for tensor, entry in seen:
            if tensor is x and inputs.setdefault(name, entry) is entry:
                return
        size = x.shape[-1]
        entry = inputs.setdefault(name, _Inputs(torch.zeros(size), torch.zeros(size, size)))
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        weights = stage.row_weights(at_work, len(rows))
        weighted = rows * weights[:, None]
        entry.size += weighted.abs().sum(0)
        entry.total += float(weights.sum())
        entry.hessian.addmm_(weighted.T, rows)
        seen.append((x, entry))

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
    missing = sorted(needed - inputs.keys())
    assert not missing, f"{missing[0]}: no sample went through it"
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
        _multiply(found.column_factors, name, columns)
    entry = _inputs_of(fold, inputs)
    entry.size /= columns
    entry.hessian.div_(columns[:, None]).div_(columns)
    for rows in fold.writers:
        parameter = stage.parameters[rows.parameter]
        inverse = torch.ones(len(parameter))
        inverse[rows.start : rows.start + len(factors_C)] = 1 / factors_C
        if parameter.dim() == 1:
            parameter.data *= inverse
            found.vectors[rows.parameter] = parameter.data.numpy().copy()
        else:
            parameter.data *= inverse[:, None]
            _multiply(found.row_factors, rows.parameter, inverse)


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
        return gptq_rows(weight, inputs.hessian, format, scale_dtype=dtype, name=name)
    blocks = blocks_of(weight, format.block_size)
    grid = best_grid(blocks, format, _of_blocks(inputs.hessian, format.block_size), dtype)
    codes = grid.round(blocks).to(torch.uint8).flatten(1).numpy()
    return codes, grid.scales.numpy(), grid.zero_points.to(torch.uint8).numpy()


def _of_blocks(hessian: torch.Tensor, block_size: int) -> torch.Tensor:
    """What lies on the diagonal of H [K, K], block by block: [B, S, S]."""
    missing = -len(hessian) % block_size
    padded = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
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
