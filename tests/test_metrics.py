"""Metrics: known values by hand, and the properties that a divergence must have."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlmport.validate.metrics import (
    LogitErrors,
    TensorErrors,
    drift_slope,
    log_softmax,
    logit_errors,
    margins,
    tensor_errors,
)

_floats = st.floats(-50, 50, width=32)
_logits = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(2, 9)), elements=_floats)


def _pairs(draw_shape=_logits):
    return draw_shape.flatmap(lambda a: st.tuples(st.just(a), hnp.arrays(np.float32, a.shape, elements=_floats)))


def test_tensor_metrics_by_hand():
    reference = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    candidate = np.array([[3.0, 4.0], [2.0, 0.0]], np.float32)
    m = tensor_errors(reference, candidate).metrics()
    assert (m.count, m.max_abs, m.mean_abs) == (4, 2.0, 1.0)
    assert m.relative_l2 == pytest.approx(math.sqrt(8 / 29))
    assert m.snr_db == pytest.approx(10 * math.log10(29 / 8))
    assert (m.cosine_min, m.cosine_mean) == (0.0, 0.5)


def test_sums_are_exact_where_float32_would_lose_them():
    reference = np.full((1, 1 << 20), 1.0, np.float32)
    m = tensor_errors(reference, reference + np.float32(1e-3)).metrics()
    assert m.mean_abs == pytest.approx(float(np.float32(1.001)) - 1.0, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_candidate_that_is_not_finite_cannot_look_good(bad):
    reference = np.ones((4, 3), np.float32)
    candidate = reference.copy()
    candidate[2, 1] = bad
    m = tensor_errors(reference, candidate).metrics()
    assert m.max_abs == math.inf
    assert m.cosine_min == -1.0
    assert m.num_nan + m.num_inf == 1
    errors = logit_errors(reference, candidate)
    assert errors.kl[2] == math.inf
    assert not errors.same[2]
    assert errors.same[0]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        tensor_errors(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="shapes differ"):
        logit_errors(np.zeros((2, 3)), np.zeros((2, 4)))


def test_an_empty_comparison_has_no_numbers():
    assert math.isnan(tensor_errors(np.zeros((0, 3)), np.zeros((0, 3))).metrics().max_abs)
    assert logit_errors(np.zeros((0, 3)), np.zeros((0, 3))).kl.size == 0


def test_zero_rows_agree_with_zero_rows_only():
    reference = np.array([[0.0, 0.0], [0.0, 0.0]])
    assert tensor_errors(reference, reference).metrics().cosine_min == 1.0
    assert tensor_errors(reference, np.array([[0.0, 0.0], [1.0, 0.0]])).metrics().cosine_min == 0.0


def test_blocks_change_nothing(monkeypatch):
    random = np.random.default_rng(1)
    a, b = random.normal(size=(50, 7)), random.normal(size=(50, 7))
    whole, whole_logits = tensor_errors(a, b).metrics(), logit_errors(a, b)
    monkeypatch.setattr("vlmport.validate.metrics._BLOCK", 21)
    assert tensor_errors(a, b).metrics().max_abs == whole.max_abs
    assert tensor_errors(a, b).metrics().relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)
    np.testing.assert_array_equal(logit_errors(a, b).kl, whole_logits.kl)


@given(_pairs())
def test_join_of_parts_is_the_whole(pair):
    a, b = pair
    parts = [tensor_errors(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
    joined, whole = TensorErrors.join(parts).metrics(), tensor_errors(a, b).metrics()
    assert joined.max_abs == whole.max_abs
    assert joined.count == whole.count
    assert joined.cosine_p1 == pytest.approx(whole.cosine_p1, abs=1e-12)
    logits = [logit_errors(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
    np.testing.assert_array_equal(LogitErrors.join(logits).kl, logit_errors(a, b).kl)


@given(_logits)
def test_identical_is_perfect(a):
    m = tensor_errors(a, a.copy()).metrics()
    assert (m.max_abs, m.relative_l2, m.cosine_min, m.snr_db) == (0.0, 0.0, 1.0, math.inf)
    errors = logit_errors(a, a.copy())
    assert errors.kl.max() == 0.0
    assert errors.same.all()
    assert errors.top5.all()
    assert not errors.delta_p.any()


@given(_pairs())
def test_divergence_is_never_negative_and_cosine_stays_in_range(pair):
    a, b = pair
    errors = logit_errors(a, b)
    assert (errors.kl >= 0).all()
    assert (np.abs(errors.delta_p) <= 1).all()
    assert (errors.margin >= 0).all()
    m = tensor_errors(a, b).metrics()
    assert -1 <= m.cosine_min <= m.cosine_mean <= 1
    assert m.mean_abs <= m.max_abs + 1e-12


@given(_pairs(), st.integers(-64, 64), st.integers(-64, 64))
def test_divergence_ignores_a_shift_of_all_logits(pair, shift_a, shift_b):
    a, b = (side.astype(np.float64) for side in pair)
    plain, shifted = logit_errors(a, b), logit_errors(a + shift_a, b + shift_b)
    np.testing.assert_allclose(shifted.kl, plain.kl, atol=1e-9)


@given(_logits)
def test_log_softmax_sums_to_one(a):
    np.testing.assert_allclose(np.exp(log_softmax(a)).sum(axis=-1), 1.0, rtol=1e-12)


def test_kl_by_hand_and_its_direction():
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    errors = logit_errors(np.log(p)[None], np.log(q)[None])
    assert errors.kl[0] == pytest.approx(forward)
    assert errors.kl[0] != pytest.approx(logit_errors(np.log(q)[None], np.log(p)[None]).kl[0])
    assert errors.delta_p[0] == pytest.approx(-0.25)


def test_top5_looks_from_both_sides():
    reference, candidate = np.arange(10.0)[None], np.arange(10.0)[None].copy()
    candidate[0, 9] = -1  # the reference's choice is the candidate's last
    assert not logit_errors(reference, candidate).top5[0]
    assert margins(reference)[0] == 1.0


def test_drift_slope():
    assert drift_slope([np.array([0.0, 0.1, 0.2]), np.array([0.0, 0.1])]) == pytest.approx(0.1)
    assert drift_slope([]) == 0.0
    assert drift_slope([np.array([0.5])]) == 0.0
