"""Activation-aware factors (AWQ, arXiv 2306.00978) that make room in the codes for what large activations read.

Dims: K columns (inputs) of the reading linears, C channels of a fold.

    s [C] = a ** alpha / w ** (1 - alpha)        a mean |x|, w largest |weight| of the channel

A fold (quant/folds.py) moves s from what writes the channels into the weights that read them; in float nothing
changes. alpha is the one, of a few, with the least error of the block's output on calibration tokens. None is taken
that does not lower it clearly: without outliers there is nothing to gain, and what is gained on few tokens is lost on
others.
"""

# pyright: standard
# PyTorch tells only some of its types.

from collections.abc import Callable, Mapping

import torch

from .folds import Fold
from .grid import nearest_grid
from .recipe import WeightFormat

__all__ = ["Weights", "blocks_of", "fold_factors", "nearest_weight"]

# (alpha, whether large weights lower the factor)
_CANDIDATES = ((0.25, True), (0.5, True), (0.75, True), (1.0, True), (0.3, False), (0.6, False))
_CLEAR_GAIN = 0.75  # of the error without factors
_SMALLEST = 1e-6

Weights = Mapping[str, torch.nn.Parameter]


def fold_factors(
    fold: Fold,
    parameters: Weights,
    formats: Mapping[str, WeightFormat],
    mean_inputs_K: torch.Tensor,
    output_error: Callable[[], float],
) -> torch.Tensor | None:
    """The factors s [C] of a fold, or None where none lowers the error clearly.

    `mean_inputs_K` is the mean |x| of the readers' input. Weights are as before when it returns.
    """
    channels = torch.from_numpy(fold.channels)
    readers = {name: parameters[name].data for name in fold.readers}
    activation_C = _by_channel(mean_inputs_K, channels, fold.num_channels, "mean")
    largest_K = torch.stack([weight.abs().amax(0) for weight in readers.values()]).amax(0)
    weight_C = _by_channel(largest_K, channels, fold.num_channels, "amax")

    def error_with(factors_C: torch.Tensor) -> float:
        for name, weight in readers.items():
            columns = factors_C[channels]
            parameters[name].data = nearest_weight(weight * columns, formats.get(name)) / columns
        return output_error()

    try:
        best, least = None, _CLEAR_GAIN * error_with(torch.ones(fold.num_channels))
        for alpha, by_weight in _CANDIDATES:
            factors_C = activation_C**alpha / (weight_C ** (1 - alpha) if by_weight else 1)
            factors_C = factors_C / (factors_C.max() * factors_C.min()).sqrt()
            error = error_with(factors_C)
            if error < least:
                best, least = factors_C, error
    finally:
        for name, weight in readers.items():
            parameters[name].data = weight
    return best


def nearest_weight(weight_NK: torch.Tensor, format: WeightFormat | None) -> torch.Tensor:
    """What rounding to nearest makes of a weight; unchanged where its format has no blocks."""
    if format is None or not format.has_blocks:
        return weight_NK
    blocks = blocks_of(weight_NK, format.block_size)
    return nearest_grid(blocks, format).nearest(blocks).flatten(1)[:, : weight_NK.shape[1]]


def blocks_of(weight_NK: torch.Tensor, block_size: int) -> torch.Tensor:
    """[N, B, S], padded with zeros."""
    missing = -weight_NK.shape[1] % block_size
    return torch.nn.functional.pad(weight_NK, (0, missing)).unflatten(1, (-1, block_size))


def _by_channel(values_K: torch.Tensor, channels_K: torch.Tensor, num_channels: int, how: str) -> torch.Tensor:
    found = torch.zeros(num_channels).scatter_reduce_(0, channels_K, values_K, how, include_self=False)
    return found.clamp_(min=_SMALLEST)
