"""Picks the next token from logits: what transformers' logits processors do, in the same order.

repetition penalty, temperature, top-k, top-p, min-p (transformers `GenerationMixin._get_logits_processor`), then one
draw. Scores are kept as (ids, scores) of what is still possible, so that the sort of top-p is short after top-k.

    V  vocabulary     K  candidates that are left
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .errors import InputError, PackageError
from .session import Array

__all__ = ["Sampler", "SamplingParams", "distribution"]


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. Every field's default is off; temperature 0 is greedy, and then only the penalty matters."""

    temperature: float = 0.0
    top_k: int = 0  # the k best; 0: all
    top_p: float = 1.0  # the fewest best whose probabilities reach p
    min_p: float = 0.0  # those at least this fraction as probable as the best
    repetition_penalty: float = 1.0  # over the sampler's prompt and the answer; above 1 discourages repeats
    seed: int | None = None  # None: another draw each time

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf, "0 is greedy, 1 is the model's own distribution")
        _check("top_k", self.top_k, 0, math.inf, "0 is off")
        _check("top_p", self.top_p, 0.0, 1.0, "1 is off")
        _check("min_p", self.min_p, 0.0, 1.0, "0 is off")
        _check("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 is off")
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty: 0 is not above 0; 1 is off")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed: {self.seed} is negative; give 0 or more, or none")


class Sampler:
    """Samples one sequence. It remembers the ids so far, which the repetition penalty needs."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        """prompt_ids: those that the penalty counts: none, or all of them, placeholders included, as upstream does."""
        self._params = params
        self._seen = {int(token_id) for token_id in prompt_ids}
        self._random = np.random.default_rng(params.seed)

    def __call__(self, logits_V: Array) -> int:
        """The next token id. logits_V: float32 [V], left as they are. Raises PackageError where they are NaN."""
        scores_V = self._penalize(logits_V)
        best = int(scores_V.argmax())  # NaN wins argmax, so one look finds it
        if np.isnan(scores_V[best]):
            raise PackageError(
                "the decoder computed NaN logits: its weights are damaged or overflow in this precision; "
                "a variant made with --calibration keeps what overflows in float32"
            )
        token_id = best if self._params.temperature == 0 else self._draw(scores_V)
        self._seen.add(token_id)
        return token_id

    def _penalize(self, logits_V: Array) -> Array:
        penalty = np.float32(self._params.repetition_penalty)
        if penalty == 1:
            return logits_V
        ids = np.array([token_id for token_id in self._seen if 0 <= token_id < len(logits_V)], np.int64)
        scores_V = logits_V.copy()
        seen = scores_V[ids]
        scores_V[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
        return scores_V

    def _draw(self, scores_V: Array) -> int:
        ids_K, probabilities_K = distribution(scores_V, self._params)
        drawn = int(np.searchsorted(np.cumsum(probabilities_K), self._random.random(), side="right"))
        return int(ids_K[min(drawn, len(ids_K) - 1)])


def distribution(scores_V: Array, params: SamplingParams) -> tuple[Array, Array]:
    """Ids [K] that may be drawn and their float64 probabilities [K], after temperature, top-k, top-p and min-p."""
    # The k best are the same at every temperature; with them taken first, the rest is short work.
    ids_K, scores_K = _top_k(scores_V, params.top_k)
    scores_K = scores_K.astype(np.float64)
    # Relative to the best, so that a temperature of 1e-6, which checkpoints do have, cannot overflow.
    with np.errstate(over="ignore"):  # to -inf, which is probability 0
        scores_K = (scores_K - scores_K.max()) / params.temperature
    ids_K, scores_K = _top_p(ids_K, scores_K, params.top_p)
    ids_K, scores_K = _min_p(ids_K, scores_K, params.min_p)
    weights_K = np.exp(scores_K)
    return ids_K, weights_K / weights_K.sum()


def _top_k(scores_V: Array, k: int) -> tuple[Array, Array]:
    """Ids and scores of the k best, and of all that tie with the last of them."""
    if k == 0 or k >= len(scores_V):
        return np.arange(len(scores_V)), scores_V
    (ids_K,) = np.nonzero(scores_V >= np.partition(scores_V, -k)[-k])
    return ids_K, scores_V[ids_K]


def _top_p(ids: Array, scores: Array, p: float) -> tuple[Array, Array]:
    """Drops the least probable as long as what is dropped sums to at most 1 - p. The best always stays."""
    if p >= 1:
        return ids, scores
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    # All that are below the mean share of 1 - p are dropped in any case: only the others have to be sorted.
    (left,) = np.nonzero(probabilities >= (1 - p) / len(probabilities))
    order = left[np.argsort(scores[left], kind="stable")]
    below = 1 - probabilities[left].sum()
    keep = below + np.cumsum(probabilities[order]) > 1 - p
    keep[-1] = True
    return ids[order][keep], scores[order][keep]


def _min_p(ids: Array, scores: Array, p: float) -> tuple[Array, Array]:
    """Drops what is less probable than p times the best; scores are relative to the best, so that is log p."""
    if p == 0:
        return ids, scores
    keep = scores >= math.log(p)
    return ids[keep], scores[keep]


def _check(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else f"a finite number of at least {low:g}"
        raise InputError(f"{name}: {value} is not {bounds}; {hint}")
