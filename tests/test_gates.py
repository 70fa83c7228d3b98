"""Gates: the one table, its overrides, and judgements that fail closed."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.runtime.errors import InputError
from vlmport.validate.gates import COLUMNS, DEFAULT_GATES, GATES_SCHEMA, STAGES, column_of, judge, load_gates, worst


def outcome(column, kind, **values):
    return worst(result.outcome for result in judge(DEFAULT_GATES, column, kind, kind, values))


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
    gates = DEFAULT_GATES.gates[column].get(kind, ())
    for values in ({}, {gate.metric: math.nan for gate in gates}):
        results = judge(DEFAULT_GATES, column, kind, "x", values)
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
    for result in judge(DEFAULT_GATES, column, "prefill", "x", {"max_abs": value, "kl_mean": value, "kl_p999": value}):
        if result.value is not None:
            assert result.would_pass == value


def test_infinite_values_have_no_tolerance_that_would_pass():
    (_, result, _) = judge(DEFAULT_GATES, "fp32-unit", "prefill", "x", {"max_abs": math.inf})
    assert result.outcome == "FAIL"
    assert result.would_pass is None


def test_columns_loosen_from_left_to_right():
    margins = [DEFAULT_GATES.tie_margin[column] for column in COLUMNS]
    assert margins == sorted(margins)
    kl = [{g.metric: g.limit for g in DEFAULT_GATES.gates[c]["prefill"]}.get("kl_mean", 0.0) for c in COLUMNS]
    assert kl == sorted(kl)


def test_every_gate_says_where_it_comes_from():
    for stages in DEFAULT_GATES.gates.values():
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


def write(tmp_path, document):
    file = tmp_path / "gates.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def test_a_file_replaces_adds_and_removes(tmp_path):
    document = {
        "schema": GATES_SCHEMA,
        "gates": {"int8": {"prefill": {"kl_mean": 0.5, "kl_p999": None, "kl_max": 9}, "generation": {"match": 0.5}}},
        "tie_margin": {"int8": 0.25},
    }
    table = load_gates(write(tmp_path, document))
    limits = {gate.metric: gate.limit for gate in table.gates["int8"]["prefill"]}
    assert limits["kl_mean"] == 0.5
    assert limits["kl_max"] == 9.0
    assert "kl_p999" not in limits
    assert limits["same_top1"] == 0.99
    assert [gate.limit for gate in table.gates["int8"]["generation"]] == [0.5]
    assert table.tie_margin["int8"] == 0.25
    assert table.tie_margin["int4"] == DEFAULT_GATES.tie_margin["int4"]
    assert table.gates["int4"] == DEFAULT_GATES.gates["int4"]
    assert str(tmp_path) in table.origin


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "not JSON"),
        ([], "expected an object"),
        ({}, "schema"),
        ({"schema": "vlmport-gates/2"}, "schema"),
        ({"schema": GATES_SCHEMA, "more": 1}, "'more'"),
        ({"schema": GATES_SCHEMA, "gates": {"int3": {}}}, "'int3'"),
        ({"schema": GATES_SCHEMA, "gates": {"int8": {"decoding": {}}}}, "'decoding'"),
        ({"schema": GATES_SCHEMA, "gates": {"int8": {"decode": {"kl": 1}}}}, "'kl'"),
        ({"schema": GATES_SCHEMA, "gates": {"int8": {"decode": {"kl_mean": "1"}}}}, "kl_mean"),
        ({"schema": GATES_SCHEMA, "gates": {"int8": {"decode": {"kl_mean": True}}}}, "kl_mean"),
        ({"schema": GATES_SCHEMA, "gates": {"int8": {"decode": [1]}}}, "expected an object"),
        ('{"schema": "vlmport-gates/1", "tie_margin": {"int8": NaN}}', "tie_margin.int8"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, document, words):
    with pytest.raises(InputError, match=words) as caught:
        load_gates(write(tmp_path, document))
    assert "gates.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such gates file"):
        load_gates(tmp_path / "none.json")
