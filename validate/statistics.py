"""What a sample of answers says, and how surely: shares and divergences with their number and a confidence interval.

Intervals are 95 %, by bootstrap over samples (intervals.py), for all but a maximum: of that, resampling tells nothing.

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

from .intervals import Interval, Ratio, quantiles, ratio, ratios
from .metrics import LogitErrors

__all__ = [
    "AnswerEvidence",
    "Divergence",
    "KlSummary",
    "Statistics",
    "StepKl",
    "TokenClass",
    "classifier",
    "first_divergence",
    "summarize",
    "summarize_kl",
]

Float64 = NDArray[np.float64]
TokenClass = Literal["digits", "text", "special"]
_SIZES = ((256, "up to 256 patches"), (1024, "257 to 1,024"), (4096, "1,025 to 4,096"), (math.inf, "over 4,096"))


@dataclass(frozen=True)
class KlSummary:
    """Divergence of next-token distributions over positions, in nats; same_top1 and top5 are shares of positions.

    `intervals` has those of median, p99, p999, same_top1, top5 and delta_p_rms; ci_low and ci_high are the mean's.
    """

    num_positions: int
    num_samples: int
    mean: float
    stderr: float
    ci_low: float
    ci_high: float
    median: float
    p99: float
    p999: float
    max: float
    same_top1: float
    top5: float  # where each side's first choice is among the other's five
    delta_p_rms: float  # of the probability of the reference's first choice
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class StepKl:
    """Mean divergence at one position of the answers, counted from 0."""

    step: int
    num_samples: int
    mean: float
    ci_low: float
    ci_high: float
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
        kl=summarize_kl([answer.errors for answer in kept]),
        by_class={
            name: summarize_kl(
                [_where(answer.errors, classes == name) for answer, classes in zip(kept, tokens, strict=True)]
            )
            for name in ("digits", "text", "special")
            if any((classes == name).any() for classes in tokens)
        },
        by_size={
            name: summarize_kl([answer.errors for answer, size in zip(kept, sizes, strict=True) if size == name])
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


def summarize_kl(parts: Sequence[LogitErrors]) -> KlSummary:
    """What a report says of divergences; a part is a sample, and those without positions do not count."""
    parts = [part for part in parts if part.kl.size]
    if not parts:
        return KlSummary(0, 0, *[math.nan] * 11, intervals={})
    errors = LogitErrors.join(parts)
    sizes = np.array([float(part.kl.size) for part in parts])
    totals = np.array([part.kl.sum() for part in parts])
    mean = ratio(totals, sizes)
    same, top5 = (
        ratio(np.array([float(getattr(part, name).sum()) for part in parts]), sizes, is_share=True)
        for name in ("same", "top5")
    )
    squares = ratio(np.array([np.square(part.delta_p).sum() for part in parts]), sizes)
    levels = {"median": 0.5, "p99": 0.99, "p999": 0.999}
    found = dict(zip(levels, quantiles([part.kl for part in parts], list(levels.values())), strict=True))
    found |= {name: Interval(share.ci_low, share.ci_high) for name, share in (("same_top1", same), ("top5", top5))}
    found["delta_p_rms"] = Interval(math.sqrt(squares.ci_low), math.sqrt(squares.ci_high))
    return KlSummary(
        num_positions=int(errors.kl.size),
        num_samples=len(parts),
        mean=mean.value,
        stderr=_stderr(totals, sizes),
        ci_low=mean.ci_low,
        ci_high=mean.ci_high,
        median=_quantile(errors.kl, levels["median"]),
        p99=_quantile(errors.kl, levels["p99"]),
        p999=_quantile(errors.kl, levels["p999"]),
        max=float(errors.kl.max()),
        same_top1=same.value,
        top5=top5.value,
        delta_p_rms=math.sqrt(squares.value),
        intervals=found,
    )


def _quantile(values_N: Float64, level: float) -> float:
    """Between two values by a line, as far as there is one: beside an infinite value it is that one."""
    method = "linear" if np.isfinite(values_N).all() else "higher"
    return float(np.quantile(values_N, level, method=method))


def _stderr(totals_S: Float64, sizes_S: Float64) -> float:
    """Of a mean over positions, samples being clusters: a ratio estimator's (Cochran, Sampling Techniques, 6.9)."""
    count = len(totals_S)
    if count < 2 or not np.isfinite(totals_S).all():
        return math.nan
    residuals_S = totals_S - sizes_S * (totals_S.sum() / sizes_S.sum())
    return math.sqrt(count / (count - 1) * float(np.square(residuals_S).sum())) / float(sizes_S.sum())


def _by_step(kl: Sequence[Float64]) -> tuple[StepKl, ...]:
    longest = max((values.size for values in kl), default=0)
    kl_ST, held_ST = np.zeros((len(kl), longest)), np.zeros((len(kl), longest), bool)
    for row, values in enumerate(kl):
        kl_ST[row, : values.size], held_ST[row, : values.size] = values, True
    return tuple(
        StepKl(
            step=step,
            num_samples=mean.num_samples,
            mean=mean.value,
            ci_low=mean.ci_low,
            ci_high=mean.ci_high,
            p90=_quantile(kl_ST[held_ST[:, step], step], 0.9),
        )
        for step, mean in enumerate(ratios(kl_ST, held_ST.astype(np.float64), held_SK=held_ST))
    )


def _where(errors: LogitErrors, mask_N: NDArray[Any]) -> LogitErrors:
    names = ("kl", "same", "margin", "top5", "delta_p")
    return LogitErrors(**{name: getattr(errors, name)[mask_N[: errors.kl.size]] for name in names})


def _size(num_patches: int) -> str:
    if num_patches == 0:
        return "no image"
    return next(name for limit, name in _SIZES if num_patches <= limit)
