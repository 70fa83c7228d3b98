"""Statistics of answers by hand: each number, how many it is of, and how sure it is."""

import dataclasses
import math

import numpy as np
import pytest

from vlmport.validate.compare import compare_logits, stage_rows
from vlmport.validate.gates import default_gates
from vlmport.validate.intervals import quantiles, ratio, ratios
from vlmport.validate.metrics import LogitErrors, logit_errors
from vlmport.validate.report import plain
from vlmport.validate.statistics import AnswerEvidence, first_divergence, summarize, summarize_kl

CLASSES = {1: "digits", 2: "text", 3: "special", 9: "text"}


def errors(kl, *, same=None, margin=None, delta_p=None):
    """Errors of one sample; what is not said is without error."""
    size = len(kl)
    return LogitErrors(
        kl=np.array(kl, float),
        same=np.ones(size, bool) if same is None else np.array(same),
        margin=np.ones(size) if margin is None else np.array(margin, float),
        top5=np.ones(size, bool),
        delta_p=np.zeros(size) if delta_p is None else np.array(delta_p, float),
    )


ANSWERS = (
    # Equal to the reference.
    AnswerEvidence("a", errors([0.0, 0.1, 0.2, 0.3]), (1, 2, 2, 3), (1, 2, 2, 3), num_patches=200),
    # Another id at step 1, where the reference's margin is 0.05: a near tie of 0.1.
    AnswerEvidence("b", errors([0.0, 0.4], same=[True, False], margin=[1, 0.05]), (1, 2), (1, 9), num_patches=300),
    # Ends at step 2, where the reference goes on with a margin of 2: an error.
    AnswerEvidence(
        "c", errors([0.2, 0.2, 0.2, 0.4], delta_p=[0.3, 0, 0, 0.4], margin=[1, 1, 2, 1]), (1, 2, 2, 3), (1, 2), 5000
    ),
    # Goes on where the reference has ended: no margin, so no tie.
    AnswerEvidence("d", errors([0.0]), (3,), (3, 2), num_patches=0),
)


@pytest.fixture(scope="module")
def told():
    return summarize(ANSWERS, 0.1, CLASSES.__getitem__)


def test_divergence_by_hand(told):
    values = [0.0, 0.1, 0.2, 0.3, 0.0, 0.4, 0.2, 0.2, 0.2, 0.4, 0.0]
    assert told.kl.num_positions == 11
    assert told.kl.num_samples == 4
    assert told.kl.mean == pytest.approx(2.0 / 11)
    assert told.kl.median == 0.2
    assert told.kl.p99 == pytest.approx(np.quantile(values, 0.99))
    assert told.kl.p999 == pytest.approx(np.quantile(values, 0.999))
    assert told.kl.max == 0.4
    assert told.kl.same_top1 == pytest.approx(10 / 11)
    assert told.kl.delta_p_rms == pytest.approx(math.sqrt((0.09 + 0.16) / 11))
    # Totals 0.6, 0.4, 1.0, 0.0 in 4, 2, 4, 1 positions: residuals from 2/11 a position, Cochran 6.9.
    residuals = np.array([0.6, 0.4, 1.0, 0.0]) - np.array([4, 2, 4, 1]) * 2.0 / 11
    assert told.kl.stderr == pytest.approx(math.sqrt(4 / 3 * (residuals**2).sum()) / 11)


def test_every_number_has_its_interval(told):
    for kl in (told.kl, *told.by_class.values()):
        assert set(kl.intervals) == {"median", "p99", "p999", "same_top1", "top5", "delta_p_rms"}
    assert told.kl.ci_low < told.kl.mean < told.kl.ci_high
    for name, interval in told.kl.intervals.items():
        assert interval.ci_low <= getattr(told.kl, name) <= interval.ci_high, name
    assert told.kl.intervals["top5"].ci_low == pytest.approx(0.05 ** (1 / 4)), "never an event in four samples"
    assert all(math.isnan(step.ci_low) for step in told.by_step if step.num_samples < 2)


def test_by_class_by_size_and_by_step(told):
    assert {name: kl.num_positions for name, kl in told.by_class.items()} == {"digits": 3, "text": 5, "special": 3}
    assert told.by_class["digits"].mean == pytest.approx(0.2 / 3)
    assert told.by_class["text"].mean == pytest.approx((0.1 + 0.2 + 0.4 + 0.2 + 0.2) / 5)
    assert told.by_class["special"].mean == pytest.approx((0.3 + 0.4 + 0.0) / 3)
    assert {name: kl.num_samples for name, kl in told.by_size.items()} == {
        "up to 256 patches": 1,
        "257 to 1,024": 1,
        "over 4,096": 1,
        "no image": 1,
    }
    assert told.by_size["over 4,096"].mean == pytest.approx(0.25)
    assert [step.num_samples for step in told.by_step] == [4, 3, 2, 2]
    assert [step.mean for step in told.by_step] == pytest.approx([0.05, 0.7 / 3, 0.2, 0.35])
    assert told.by_step[1].p90 == pytest.approx(np.quantile([0.1, 0.4, 0.2], 0.9))
    assert told.by_step[1].ci_low <= told.by_step[1].mean <= told.by_step[1].ci_high


def test_first_divergences_and_what_they_are(told):
    assert first_divergence(ANSWERS[0], 0.1) is None
    assert [(d.sample, d.step, d.num_steps, d.tie_like) for d in told.divergences] == [
        ("b", 1, 2, True),
        ("c", 2, 4, False),
        ("d", 1, 2, False),
    ]
    assert told.divergences[0].reference_margin == 0.05
    assert math.isnan(told.divergences[2].reference_margin)
    assert told.exact_ids.value == 0.25
    assert told.exact_ids_off_ties.value == 0.5
    assert told.first_divergence_norm.value == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    for share in (told.exact_ids, told.exact_ids_off_ties, told.first_divergence_norm):
        assert share.num_samples == 4
        assert share.ci_low <= share.value <= share.ci_high


def test_a_report_holds_all_of_it(told):
    document = plain(told)
    assert set(document) == {field.name for field in dataclasses.fields(told)}
    assert document["kl"]["intervals"]["p99"]["ci_high"] == told.kl.intervals["p99"].ci_high


def test_whole_samples_are_drawn_not_positions():
    """Positions of a sample are equal: forty samples of a hundred positions say no more than forty positions do."""
    random = np.random.default_rng(1)
    means = random.gamma(1.0, 0.1, 40)
    long, short = (summarize_kl([errors(np.full(size, mean)) for mean in means]) for size in (100, 1))
    assert (long.ci_low, long.ci_high) == pytest.approx((short.ci_low, short.ci_high))
    assert long.stderr == pytest.approx(short.stderr) == pytest.approx(means.std(ddof=1) / math.sqrt(40))
    assert long.ci_high - long.ci_low == pytest.approx(2 * 1.96 * long.stderr, rel=0.2)
    assert long.intervals["median"].ci_low < np.median(means) < long.intervals["median"].ci_high


def test_a_quantile_of_drawn_samples_is_that_of_their_values():
    parts = [np.array([1.0]), np.array([2.0, 3.0])]
    (median,) = quantiles(parts, [0.5])
    assert (median.ci_low, median.ci_high) == (1.0, 2.0), "rounds of a: 1; of both: 2; of b: 2"


def test_one_sample_and_infinite_values_have_no_interval():
    one = ratio(np.array([0.3]), np.array([2.0]))
    assert one.value == pytest.approx(0.15)
    assert math.isnan(one.ci_low)
    broken = summarize_kl([errors([0.1]), errors([math.inf])])
    assert broken.mean == math.inf
    assert broken.p99 == math.inf
    assert math.isnan(broken.ci_high)
    assert math.isnan(broken.intervals["p99"].ci_low)
    assert math.isnan(summarize_kl([]).mean)


def test_events_that_never_happened_have_the_binomial_bound():
    never = ratio(np.zeros(100), np.ones(100))
    assert (never.value, never.ci_low) == (0.0, 0.0)
    assert never.ci_high == pytest.approx(1 - 0.05 ** (1 / 100))
    assert ratio(np.zeros(100), np.full(100, 3.0)).ci_high == 0.0, "a sum of zeros is no share unless it is said"
    assert ratio(np.full(100, 3.0), np.full(100, 3.0), is_share=True).ci_low == pytest.approx(0.05 ** (1 / 100))


def test_ratios_are_of_the_samples_that_they_hold():
    above, below = np.array([[1.0, 0.0], [2.0, 5.0]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    first, second = ratios(above, below, held_SK=below == 1)
    assert (first.value, first.num_samples) == (1.5, 2)
    assert (second.value, second.num_samples) == (5.0, 1)
    gained = ratio(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    assert (gained.value, gained.num_samples) == (2.0, 2), "what a variant gains counts, though the reference had none"


def test_a_flip_counts_as_a_tie_only_within_the_margin():
    reference = np.array([[1.0, 0.95, 0.0], [1.0, 0.2, 0.0], [1.0, 0.3, 0.0], [1.0, 0.0, 0.0]])
    candidate = np.array([[0.9, 1.0, 0.0], [0.2, 1.0, 0.0], [0.3, 1.0, 0.0], [1.0, 0.0, 0.0]])
    table = dataclasses.replace(default_gates(), tie_margin=dict.fromkeys(default_gates().tie_margin, 0.1))
    record = compare_logits("a", "prefill", "prefill", reference, candidate)
    (row,) = stage_rows([record], table, {"prefill": "fp32"})
    assert row.values["same_top1"] == 0.25
    assert row.values["same_top1_off_ties"] == 0.5
    assert row.values["num_ties_flipped"] == 1
    assert row.values["kl_mean"] == pytest.approx(logit_errors(reference, candidate).kl.mean())
