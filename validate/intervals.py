"""How sure a number over samples is: 95 % intervals by bootstrap over whole samples, seeded, one mechanism for all.

The tokens of one answer are no independent draws, so positions are never resampled by themselves: a round draws as many
samples as there are, with replacement, and counts how often each was drawn. Every statistic is one of those counts:
a ratio of two weighted sums, or a quantile of weighted values. (Efron and Tibshirani, An Introduction to the Bootstrap,
13.3; clusters as in Davison and Hinkley, 3.8.) Where an event never happened, or always did, resampling has no spread;
the bound is then the exact binomial one (one-sided Clopper-Pearson: 1 - 0.05^(1/n), about 3/n).

Dims: S samples, K statistics at once, N values.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "Ratio", "quantiles", "ratio", "ratios"]

Float64 = NDArray[np.float64]
_ROUNDS = 1000
_SEED = 20
_LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of a statistic over rounds. NaN where it cannot be told: one sample, or infinite values."""

    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Ratio:
    """A sum over another with its 95 % interval. NaN throughout where the denominators add up to nothing."""

    value: float
    num_samples: int
    ci_low: float
    ci_high: float


def ratio(numerators_S: Float64, denominators_S: Float64, *, is_share: bool = False) -> Ratio:
    """sum(numerators) / sum(denominators) over samples.

    `is_share`: numerators count events among denominators. Numbers of events 0 and 1 in 1 are a share without saying.
    """
    return ratios(numerators_S[:, None], denominators_S[:, None], is_share=is_share)[0]


def ratios(
    numerators_SK: Float64,
    denominators_SK: Float64,
    *,
    is_share: bool = False,
    held_SK: NDArray[np.bool_] | None = None,
) -> tuple[Ratio, ...]:
    """K ratios of the same samples at once. `held_SK`: which samples each is of, the others being 0; None: all."""
    low_K, high_K = _resampled_ratios(numerators_SK, denominators_SK)
    found: list[Ratio] = []
    for column in range(numerators_SK.shape[1]):
        held_S = slice(None) if held_SK is None else held_SK[:, column]
        above, below = numerators_SK[held_S, column], denominators_SK[held_S, column]
        count, total = len(above), float(below.sum())
        if total == 0:
            found.append(Ratio(math.nan, count, math.nan, math.nan))
            continue
        value = float(above.sum()) / total
        shares = is_share or bool((below == 1).all() and ((above == 0) | (above == 1)).all())
        if shares and value in (0.0, 1.0):
            bound = _LEVEL ** (1 / count)
            found.append(Ratio(value, count, 0.0 if value == 0 else bound, 1 - bound if value == 0 else 1.0))
        elif count < 2:
            found.append(Ratio(value, count, math.nan, math.nan))
        else:
            found.append(Ratio(value, count, float(low_K[column]), float(high_K[column])))
    return tuple(found)


def quantiles(parts: Sequence[Float64], levels: Sequence[float]) -> tuple[Interval, ...]:
    """Intervals of quantiles of the values of all samples together, one array [n] a sample."""
    values_N = np.concatenate([*parts, np.zeros(0)])
    if len(parts) < 2 or not np.isfinite(values_N).all():
        return tuple(Interval(math.nan, math.nan) for _ in levels)
    order_N = values_N.argsort()
    sample_N = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order_N]
    sorted_N = values_N[order_N]
    rounds: list[NDArray[Any]] = []
    for drawn_S in _rounds(len(parts)):
        below_N = drawn_S[sample_N].cumsum()  # how many drawn values are up to here
        places = np.searchsorted(below_N, np.multiply(levels, below_N[-1]))
        rounds.append(sorted_N[np.minimum(places, len(sorted_N) - 1)])
    lows, highs = np.quantile(rounds, [_LEVEL / 2, 1 - _LEVEL / 2], axis=0)
    return tuple(Interval(float(low), float(high)) for low, high in zip(lows, highs, strict=True))


def _resampled_ratios(numerators_SK: Float64, denominators_SK: Float64) -> tuple[Float64, Float64]:
    """Ends of the intervals [K]; NaN where there is none. Memory is rounds x K."""
    count, num = numerators_SK.shape
    ends_2K = np.full((2, num), math.nan)
    told_K = np.isfinite(numerators_SK).all(axis=0) & denominators_SK.any(axis=0)
    if count > 1 and told_K.any():
        above_SK, below_SK = numerators_SK[:, told_K], denominators_SK[:, told_K]
        sums = [(drawn_S @ above_SK, drawn_S @ below_SK) for drawn_S in _rounds(count)]
        # A round that drew none of the few samples that count is no evidence.
        rounds_RK = np.array(
            [np.where(below == 0, math.nan, above / np.where(below == 0, 1, below)) for above, below in sums]
        )
        ends_2K[:, told_K] = np.nanquantile(rounds_RK, [_LEVEL / 2, 1 - _LEVEL / 2], axis=0)
    return ends_2K[0], ends_2K[1]


def _rounds(count: int) -> Iterator[Float64]:
    """How often each of `count` samples is drawn, a round each; the same rounds for every statistic, so they pair."""
    random = np.random.default_rng(_SEED)
    for _ in range(_ROUNDS):
        yield np.bincount(random.integers(0, count, count), minlength=count).astype(np.float64)
