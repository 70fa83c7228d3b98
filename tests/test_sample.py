"""Sampling: the same candidates and probabilities as transformers' logits processors, and refusals of nonsense."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmport.runtime.errors import InputError, PackageError
from vlmport.runtime.sample import Sampler, SamplingParams, distribution

SIZE = 40


def upstream_probabilities(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    """As `generate(do_sample=True)` of transformers, in its order."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = steps(torch.tensor([seen]), torch.tensor(logits)[None])
    return torch.softmax(scores, -1)[0].numpy()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, SIZE + 5),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    penalty=st.sampled_from([1.0, 1.05, 1.9, 0.8]),
)
def test_probabilities_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(SIZE) * 3).astype(np.float32)
    seen = rng.integers(0, SIZE, 12).tolist()
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    ids, probabilities = distribution(Sampler(params, seen)._penalize(logits), params)
    ours = np.zeros(SIZE)
    ours[ids] = probabilities
    np.testing.assert_allclose(ours, upstream_probabilities(logits, seen, params), atol=2e-6)


def test_ties_at_the_edge_of_top_k_all_stay_as_upstream() -> None:
    logits = np.array([1, 2, 2, 2, 0, 3], np.float32)
    ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_k=2))
    assert ids.tolist() == [1, 2, 3, 5]


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [])
        return [sampler(logits) for _ in range(4000)]

    shares = np.bincount(draws(1), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)
    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_greedy_takes_the_best_and_leaves_the_logits_alone() -> None:
    logits = np.array([0.5, 2.0, 1.9, -1.0], np.float32)
    kept = logits.copy()
    assert Sampler(SamplingParams(repetition_penalty=1.5), [1])(logits) == 2
    assert Sampler(SamplingParams(), [1])(logits) == 1
    np.testing.assert_array_equal(logits, kept)


def test_the_penalty_counts_the_answer_and_once_each_id() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1.25), [3, 3, 3])
    logits = np.array([1.0, 1.2, 1.1, 1.4, -0.1], np.float32)
    assert [sampler(logits) for _ in range(3)] == [1, 3, 3]  # a penalty that adds up would pick 1, 2


def test_ids_outside_the_vocabulary_are_no_candidates() -> None:
    assert Sampler(SamplingParams(repetition_penalty=2.0), [-200, 99, 1])(np.array([1.0, 1.5], np.float32)) == 0


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_a_vanishing_temperature_is_greedy_without_overflow(temperature: float) -> None:
    logits = np.array([-20.0, 88.0, 87.9], np.float32)
    with np.errstate(invalid="raise", divide="raise"):
        assert Sampler(SamplingParams(temperature=temperature, top_p=0.9), [])(logits) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error_and_no_token(temperature: float) -> None:
    logits = np.array([1.0, np.nan, 2.0], np.float32)
    with pytest.raises(PackageError, match="NaN"):
        Sampler(SamplingParams(temperature=temperature), [])(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 2.0),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", -1.0),
        ("seed", -1),
    ],
)
def test_values_that_mean_nothing(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_top_p_of_a_large_vocabulary_sorts_no_more_than_it_must(p: float, spread: float) -> None:
    """The same ids and probabilities as by sorting everything."""
    scores = np.random.default_rng(5).standard_normal(20000).astype(np.float32) * np.float32(spread)
    ids, probabilities = distribution(scores, SamplingParams(temperature=1.0, top_p=p))
    shares = np.exp(scores.astype(np.float64) - scores.max())
    shares /= shares.sum()
    order = np.argsort(scores, kind="stable")
    kept = order[np.cumsum(shares[order]) > 1 - p]
    kept = kept if len(kept) else order[-1:]
    assert abs(len(ids) - len(kept)) <= 1  # sums round differently at the edge
    common = min(len(ids), len(kept))
    np.testing.assert_array_equal(ids[-common:], kept[-common:])
    np.testing.assert_allclose(probabilities.sum(), 1)
