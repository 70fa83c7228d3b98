"""What a sample of answers says, and how surely: shares and divergences with their number and a confidence interval.

Intervals are 95 %, by bootstrap over samples, not over positions: the tokens of one answer are no independent draws.
All are ratios of two sums, so one function makes them. Where an event never happened (or always did) resampling has no
spread, and the bound is the exact binomial one (one-sided Clopper-Pearson: 1 - 0.05^(1/n), about 3/n).

A first divergent token is the first position where the ids of two free-running greedy answers differ; it is tie-like
where the reference's own margin (first minus second log-probability) is within the tie margin of the gate table, else
an error. Divergences are KL(reference || variant) in nats, teacher-forced along the reference's answer.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .metrics import LogitErrors

__all__ = [
    "AnswerEvidence",
    "Divergence",
    "KlSummary",
    "Ratio",
    "Statistics",
    "StepKl",
    "TokenClass",
    "classifier",
    "first_divergence",
    "ratio",
    "summarize",
]

Float64 = NDArray[np.float64]
TokenClass = Literal["digits", "text", "special"]
_ROUNDS = 1000
_SEED = 20
_LEVEL = 0.05
_SIZES = ((256, "up to 256 patches"), (1024, "257 to 1,024"), (4096, "1,025 to 4,096"), (math.inf, "over 4,096"))


@dataclass(frozen=True)
class Ratio:
    """A sum over another with its 95 % interval. NaN throughout where the denominators add up to nothing."""

    value: float
    num_samples: int
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class KlSummary:
    """Divergence of next-token distributions over positions, in nats; same_top1 is a share of positions."""

    num_positions: int
    num_samples: int
    mean: float
    ci_low: float
    ci_high: float
    median: float
    p99: float
    p999: float
    max: float
    same_top1: float
    top5: float
    delta_p_rms: float


@dataclass(frozen=True)
class StepKl:
    """Mean divergence at one position of the answers, counted from 0."""

    step: int
    num_samples: int
    mean: float
    p90: float


@dataclass(frozen=True)
class Divergence:
    """Where a greedy answer leaves the reference's. `reference_margin` in nats, NaN where the reference had ended."""

    sample: str
    step: int
    num_steps: int  # of the longer answer
    reference_margin: float
    tie_like: bool


@dataclass(frozen=True)
class AnswerEvidence:
    """What is kept of one answered sample: errors along the reference's answer, and both free-running answers."""

    sample: str
    errors: LogitErrors  # N positions, N = len(reference_ids)
    reference_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    num_patches: int  # of all its images and clips together; 0 without one


@dataclass(frozen=True)
class Statistics:
    """All of it, for one variant."""

    kl: KlSummary
    by_class: Mapping[str, KlSummary]  # of the token that the reference chose
    by_size: Mapping[str, KlSummary]  # of the images
    by_step: tuple[StepKl, ...]
    exact_ids: Ratio  # answers whose ids are all the reference's
    exact_ids_off_ties: Ratio  # the same, a tie-like first divergence forgiven
    first_divergence_norm: Ratio  # share of an answer's ids before the first other one; 1 where there is none
    divergences: tuple[Divergence, ...]


def summarize(
    answers: Iterable[AnswerEvidence], tie_margin: float, token_class: Callable[[int], TokenClass]
) -> Statistics:
    """Statistics of one variant. Keeps five numbers a position, whatever the vocabulary is."""
    kept = list(answers)
    found = [first_divergence(answer, tie_margin) for answer in kept]
    tokens = [np.array([token_class(token) for token in answer.reference_ids], dtype=object) for answer in kept]
    sizes = [_size(answer.num_patches) for answer in kept]
    ones = np.ones(len(kept))
    return Statistics(
        kl=_kl([answer.errors for answer in kept]),
        by_class={
            name: _kl([_where(answer.errors, classes == name) for answer, classes in zip(kept, tokens, strict=True)])
            for name in ("digits", "text", "special")
            if any((classes == name).any() for classes in tokens)
        },
        by_size={
            name: _kl([answer.errors for answer, size in zip(kept, sizes, strict=True) if size == name])
            for name in dict.fromkeys([*(name for _, name in _SIZES), "no image"])
            if name in sizes
        },
        by_step=_by_step([answer.errors.kl for answer in kept]),
        exact_ids=ratio(np.array([d is None for d in found], float), ones),
        exact_ids_off_ties=ratio(np.array([d is None or d.tie_like for d in found], float), ones),
        first_divergence_norm=ratio(np.array([1.0 if d is None else d.step / d.num_steps for d in found]), ones),
        divergences=tuple(d for d in found if d is not None),
    )


def classifier(tokenizer: Tokenizer) -> Callable[[int], TokenClass]:
    """Class of a token: special as the tokenizer marks it, digits where its text has one, else text."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def token_class(token: int) -> TokenClass:
        if token in special:
            return "special"
        return "digits" if any(c.isdigit() for c in tokenizer.decode([token])) else "text"

    return token_class


def first_divergence(answer: AnswerEvidence, tie_margin: float) -> Divergence | None:
    """The first other id of a free-running answer (its end counts as one); None where both answers are equal."""
    reference, given = answer.reference_ids, answer.answer_ids
    length = max(len(reference), len(given))
    step = next((i for i in range(length) if reference[i : i + 1] != given[i : i + 1]), None)
    if step is None:
        return None
    margin = float(answer.errors.margin[step]) if step < answer.errors.margin.size else math.nan
    return Divergence(answer.sample, step, length, margin, tie_like=margin <= tie_margin)


def ratio(numerators: Float64, denominators: Float64) -> Ratio:
    """sum(numerators) / sum(denominators) over samples, [N] each, with a seeded bootstrap of whole samples.

    Numerators in 0..1 with denominators of 1 are a share; of a share that is 0 or 1 the bound is the binomial one.
    """
    count = int(numerators.size)
    total = float(denominators.sum())
    if total == 0:
        return Ratio(math.nan, count, math.nan, math.nan)
    value = float(numerators.sum()) / total
    is_share = bool((denominators == 1).all() and ((numerators == 0) | (numerators == 1)).all())
    if is_share and value in (0.0, 1.0):
        bound = _LEVEL ** (1 / count)
        return Ratio(value, count, 0.0 if value == 0 else bound, 1 - bound if value == 0 else 1.0)
    if count < 2 or not np.isfinite(numerators).all():
        return Ratio(value, count, math.nan, math.nan)
    low, high = _bootstrap(numerators, denominators)
    return Ratio(value, count, low, high)


def _bootstrap(numerators: Float64, denominators: Float64) -> tuple[float, float]:
    """Percentile interval over resampled samples, one round at a time: memory is N, not N x rounds."""
    random = np.random.default_rng(_SEED)
    count = numerators.size
    values: list[float] = []
    for _ in range(_ROUNDS):
        picked = random.integers(0, count, count)
        below = float(denominators[picked].sum())
        if below > 0:
            values.append(float(numerators[picked].sum()) / below)
    low, high = np.quantile(values, [_LEVEL / 2, 1 - _LEVEL / 2])
    return float(low), float(high)


def _kl(parts: Sequence[LogitErrors]) -> KlSummary:
    parts = [part for part in parts if part.kl.size]
    if not parts:
        return KlSummary(0, 0, *[math.nan] * 10)
    errors = LogitErrors.join(parts)
    mean = ratio(np.array([part.kl.sum() for part in parts]), np.array([float(part.kl.size) for part in parts]))
    return KlSummary(
        num_positions=int(errors.kl.size),
        num_samples=len(parts),
        mean=mean.value,
        ci_low=mean.ci_low,
        ci_high=mean.ci_high,
        median=float(np.median(errors.kl)),
        p99=float(np.quantile(errors.kl, 0.99)),
        p999=float(np.quantile(errors.kl, 0.999)),
        max=float(errors.kl.max()),
        same_top1=float(errors.same.mean()),
        top5=float(errors.top5.mean()),
        delta_p_rms=float(np.sqrt(np.mean(errors.delta_p**2))),
    )


def _by_step(kl: Sequence[Float64]) -> tuple[StepKl, ...]:
    longest = max((values.size for values in kl), default=0)
    steps: list[StepKl] = []
    for step in range(longest):
        values = np.array([each[step] for each in kl if each.size > step])
        steps.append(StepKl(step, int(values.size), float(values.mean()), float(np.quantile(values, 0.9))))
    return tuple(steps)


def _where(errors: LogitErrors, mask_N: NDArray[Any]) -> LogitErrors:
    names = ("kl", "same", "margin", "top5", "delta_p")
    return LogitErrors(**{name: getattr(errors, name)[mask_N[: errors.kl.size]] for name in names})


def _size(num_patches: int) -> str:
    if num_patches == 0:
        return "no image"
    return next(name for limit, name in _SIZES if num_patches <= limit)
