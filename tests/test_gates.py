"""Gates: the one table, its overrides, and judgements that fail closed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.runtime.errors import InputError
from vlmport.validate.advice import broken_gates
from vlmport.validate.gates import COLUMNS, GATES_SCHEMA, STAGES, column_of, default_gates, judge, load_gates, worst
from vlmport.validate.intervals import ratio


def outcome(column, kind, **values):
    return worst(result.outcome for result in judge(default_gates(), column, kind, kind, values))


def test_a_limit_is_kept_to_the_last_digit():
    good = {"num_nonfinite": 0, "max_abs": 1e-4}
    assert outcome("fp32-unit", "vision", **good) == "PASS"
    assert outcome("fp32-unit", "vision", **{**good, "max_abs": 1.0001e-4}) == "FAIL"
    assert outcome("fp32-unit", "vision", **{**good, "num_nonfinite": 1}) == "FAIL"


def test_at_least_metrics_point_the_other_way():
    good = {"num_nonfinite": 0, "cosine_p1": 0.995, "snr_db": math.inf}
    assert outcome("int8", "vision", **good) == "PASS"
    assert outcome("int8", "vision", **{**good, "cosine_p1": 0.98}) == "FAIL"


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", STAGES)
def test_an_empty_comparison_fails_every_gate(column, kind):
    gates = default_gates().gates[column].get(kind, ())
    for values in ({}, {gate.metric: math.nan for gate in gates}):
        results = judge(default_gates(), column, kind, "x", values)
        assert len(results) == len(gates)
        assert all(result.outcome == "FAIL" and result.value is None for result in results)


def test_only_ties_between_value_and_limit_is_ambiguous():
    exact = {"num_nonfinite": 0, "max_abs": 1e-5, "same_top1": 0.9}
    assert outcome("fp32-unit", "prefill", **exact, same_top1_off_ties=1.0) == "AMBIGUOUS"
    assert outcome("fp32-unit", "prefill", **exact, same_top1_off_ties=0.95) == "FAIL"
    assert outcome("fp32-unit", "prefill", **exact) == "FAIL"
    # forgiveness covers the flip, not the error beside it
    assert outcome("fp32-unit", "prefill", **{**exact, "max_abs": 1.0}, same_top1_off_ties=1.0) == "FAIL"


@given(st.floats(0, 1e3), st.sampled_from(COLUMNS))
def test_the_recorded_tolerance_would_have_passed(value, column):
    for result in judge(
        default_gates(), column, "prefill", "x", {"max_abs": value, "kl_mean": value, "kl_p999": value}
    ):
        if result.value is not None:
            assert result.would_pass == value


def test_infinite_values_have_no_tolerance_that_would_pass():
    (_, result, _) = judge(default_gates(), "fp32-unit", "prefill", "x", {"max_abs": math.inf})
    assert result.outcome == "FAIL"
    assert result.would_pass is None


def test_columns_loosen_from_left_to_right():
    margins = [default_gates().tie_margin[column] for column in COLUMNS]
    assert margins == sorted(margins)
    kl = [{g.metric: g.limit for g in default_gates().gates[c]["prefill"]}.get("kl_mean", 0.0) for c in COLUMNS]
    assert kl == sorted(kl)


def test_every_gate_says_where_it_comes_from():
    for stages in default_gates().gates.values():
        assert set(stages) <= set(STAGES)
        assert all(gate.source for gates in stages.values() for gate in gates)


@pytest.mark.parametrize(
    ("labels", "column"),
    [
        (["fp32", "fp32"], "fp32"),
        (["fp32", "int8"], "int8"),
        (["int8-dynamic", "int4-mixed"], "int4"),
        (["nf4"], "int4"),
        (["fp16", "fp32"], "fp16"),
        (["never-heard-of"], "fp32"),
        ([], "fp32"),
    ],
)
def test_the_loosest_graph_names_the_column(labels, column):
    assert column_of(labels) == column


def test_worst():
    assert worst([]) is None
    assert worst(["PASS", "AMBIGUOUS"]) == "AMBIGUOUS"
    assert worst(["PASS", "FAIL", "AMBIGUOUS"]) == "FAIL"


def write(tmp_path, text, schema=GATES_SCHEMA):
    file = tmp_path / "gates.toml"
    file.write_text((f'schema = "{schema}"\n' if schema else "") + text, encoding="utf-8")
    return file


def test_a_file_replaces_adds_and_removes(tmp_path):
    text = """
    [tie_margin]
    int8 = 0.25
    [int8.prefill]
    kl_mean = 0.5
    kl_p999 = false
    kl_max = { limit = 9, source = "our own" }
    [int8.generation]
    match = 0.5
    """
    table = load_gates(write(tmp_path, text))
    gates = {gate.metric: gate for gate in table.gates["int8"]["prefill"]}
    assert gates["kl_mean"].limit == 0.5
    assert (gates["kl_max"].limit, gates["kl_max"].source) == (9.0, "our own")
    assert "kl_p999" not in gates
    assert gates["same_top1"].limit == 0.99
    assert [gate.limit for gate in table.gates["int8"]["generation"]] == [0.5]
    assert table.tie_margin["int8"] == 0.25
    assert table.tie_margin["int4"] == default_gates().tie_margin["int4"]
    assert table.gates["int4"] == default_gates().gates["int4"]
    assert str(tmp_path) in table.origin


def test_every_default_gate_says_where_it_comes_from():
    for column in COLUMNS:
        assert "task" in default_gates().gates[column] or column == "fp32-unit"
        for stage, gates in default_gates().gates[column].items():
            assert gates, (column, stage)
            assert all(gate.source and "gates.toml" not in gate.source for gate in gates), (column, stage)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not TOML"),
        ("more = 1", "'more'"),
        ("[int3]", "'int3'"),
        ("int8 = 3", "int8: expected a table"),
        ("[int8.decoding]", "'decoding'"),
        ("[int8.decode]\nkl = 1", "'kl'"),
        ('[int8.decode]\nkl_mean = "1"', "kl_mean: expected a number"),
        ("[int8.decode]\nkl_mean = true", "kl_mean"),
        ("[int8.decode]\nkl_mean = {source = 'x'}", "kl_mean.limit: expected a number"),
        ("[int8.decode]\nkl_mean = {limit = 1, source = 2}", "kl_mean.source: expected a text"),
        ("[int8.decode]\nkl_mean = {limit = 1, more = 2}", "'more'"),
        ("[int8]\ndecode = [1]", "int8.decode: expected a table"),
        ("[tie_margin]\nint8 = nan", "tie_margin.int8"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        load_gates(write(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "gates.toml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [None, "vlmport-gates/1"])
def test_a_file_of_another_schema(tmp_path, schema):
    with pytest.raises(InputError, match="it must be 'vlmport-gates/2'"):
        load_gates(write(tmp_path, "", schema))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such gates file"):
        load_gates(tmp_path / "none.toml")


def recovery_of(num_right, num_items=100, reference_right=94):
    """Judgement of a task's recovery over items of which the reference has `reference_right`, the variant fewer."""
    reference = np.arange(num_items) < reference_right
    found = ratio((np.arange(num_items) < num_right).astype(float), reference.astype(float))
    values = {"num_items": num_items, "flips": 0.0, "recovery": found.value}
    values |= {"recovery_ci_low": found.ci_low, "recovery_ci_high": found.ci_high}
    return {gate.metric: gate for gate in judge(default_gates(), "int8", "task", "answers", values)}


def test_an_interval_that_reaches_the_limit_is_no_evidence_that_it_holds():
    assert recovery_of(94)["recovery"].outcome == "PASS"
    lost_one = recovery_of(93)["recovery"]
    assert lost_one.interval[0] < lost_one.value < lost_one.limit <= lost_one.interval[1]
    assert lost_one.outcome == "FAIL"
    told = {"rows": [{"gates": [vars(lost_one)]}]}
    assert broken_gates(told)[0].endswith("reaches: more items would tell")
    lost_ten = recovery_of(84)["recovery"]
    assert (lost_ten.outcome, lost_ten.interval[1] < lost_ten.limit) == ("FAIL", True)
    assert "more items" not in broken_gates({"rows": [{"gates": [vars(lost_ten)]}]})[0]


def test_a_sample_too_small_to_tell_fails():
    few = recovery_of(20, num_items=20, reference_right=20)
    assert (few["recovery"].outcome, few["num_items"].outcome) == ("PASS", "FAIL")
    assert recovery_of(94)["num_items"].outcome == "PASS"


def test_without_an_interval_the_number_alone_decides():
    values = {"num_items": 100.0, "flips": 0.0, "recovery": 0.98}
    assert outcome("int8", "task", **values) == "FAIL"
    assert outcome("int8", "task", **values, recovery_ci_low=math.nan, recovery_ci_high=math.nan) == "FAIL"
    # float32 answers as the reference does: one changed answer is one too many, whatever the sample
    assert outcome("fp32", "task", changed=0.01, changed_ci_low=0.0, changed_ci_high=0.03) == "FAIL"
