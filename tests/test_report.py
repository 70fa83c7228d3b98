"""The report: everything that was measured, in JSON that any reader takes, bound to the bytes it is about."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vlmport.runtime.package import MANIFEST_NAME, Package, file_entry
from vlmport.validate.advice import broken_gates
from vlmport.validate.compare import (
    Choices,
    Comparison,
    NotCompared,
    compare_ids,
    compare_logits,
    compare_tensors,
    stage_columns,
    stage_rows,
)
from vlmport.validate.gates import default_gates
from vlmport.validate.judged import hash_package
from vlmport.validate.report import (
    Report,
    VariantReport,
    report_json,
    versions,
    worst_examples,
    write_report,
)
from vlmport.validate.report_text import markdown


def records(error):
    """Three samples, the last one the worst, by an error added to every stage."""
    random = np.random.default_rng(5)
    found = []
    for number in range(3):
        shift = error * (number + 1)
        vision, logits = random.normal(size=(6, 4)), random.normal(size=(5, 9))
        moved = logits + shift * random.normal(size=logits.shape)
        found.append(compare_tensors(f"s{number}", "vision", "vision", vision, vision + shift))
        found.append(compare_logits(f"s{number}", "step_logits", "decode", logits, moved))
        found.append(compare_ids(f"s{number}", "position_ids", np.arange(4), np.arange(4)))
    return found


def columns(name):
    return dict.fromkeys(("vision", "decode", "exact", "generation", "cache"), name)


def variant(error, column="fp32", extra=()):
    found = [*records(error), *extra]
    return VariantReport(
        name=column,
        precisions={"decoder": column},
        size=10,
        rows=stage_rows(found, default_gates(), columns(column)),
        not_compared=(NotCompared("s0", "patch_embed", "not an output"),),
        examples=worst_examples(found),
        seconds=1.0,
    )


@pytest.fixture
def package(package_tiny_b, tmp_path):
    return Package.open(shutil.copytree(package_tiny_b, tmp_path / "package"))


def report(package, *variants):
    return Report(
        mode="reference",
        reference={"checkpoint": "somewhere"},
        package=package,
        files=hash_package(package, ["fp32"], lambda *_: None).sha256,
        reference_files={},
        provider="CPUExecutionProvider",
        versions=versions(),
        samples=("s0", "s1", "s2"),
        gates=default_gates(),
        variants=variants,
    )


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_join_samples_and_name_the_worst():
    rows = {row.stage: row for row in variant(1e-9).rows}
    assert rows["vision"].num_samples == 3
    assert rows["vision"].worst_sample == "s2"
    assert rows["vision"].values["max_abs"] == pytest.approx(3e-9)
    assert rows["vision"].values["count"] == 72
    assert rows["step_logits"].values["num_positions"] == 15
    assert "drift_slope" in rows["step_logits"].values
    assert rows["position_ids"].values == {"num_values": 12, "num_different": 0}
    assert {row.outcome for row in rows.values()} == {"PASS"}


def test_an_error_fails_and_the_tolerance_that_would_have_passed_is_there():
    found = variant(0.5)
    assert found.outcome == "FAIL"
    gates = {gate.metric: gate for row in found.rows if row.stage == "step_logits" for gate in row.gates}
    assert gates["max_abs"].outcome == "FAIL"
    assert gates["max_abs"].would_pass == gates["max_abs"].value > gates["max_abs"].limit


def test_nothing_judged_is_a_failure(package):
    nothing = VariantReport("fp32", {}, 0, (), (), (), 0.0)
    only_reported = stage_rows(
        [Comparison("s", "generated_ids", "generation", choices=Choices(np.array([True]), np.array([False])))],
        default_gates(),
        columns("int4"),
    )
    equal_inputs = stage_rows([compare_ids("s", "inputs", np.ones(3), np.ones(3))], default_gates(), columns("fp32"))
    assert equal_inputs[0].outcome == "PASS"
    given_alone = VariantReport("fp32", {}, 0, equal_inputs, (), (), 0.0)
    assert broken_gates(report_json(report(package, given_alone))["variants"][0]) == [
        "nothing that the graphs compute was judged"
    ]
    assert nothing.outcome == given_alone.outcome == "FAIL"
    assert VariantReport("int4", {}, 0, only_reported, (), (), 0.0).outcome == "FAIL"
    assert report(package).outcome == "FAIL"
    assert report(package, variant(1e-9), nothing).outcome == "FAIL"
    assert report(package, variant(1e-9)).outcome == "PASS"


def test_shapes_that_differ_fail_and_say_both():
    found = compare_tensors("s", "vision", "vision", np.zeros((2, 3)), np.zeros((3, 3)))
    (row,) = stage_rows([found], default_gates(), columns("int4"))
    assert row.outcome == "FAIL"
    assert "[3, 3]" in row.notes[0]
    assert "[2, 3]" in row.notes[0]
    (row,) = stage_rows(
        [compare_ids("s", "position_ids", np.zeros((3, 4), int), np.zeros(4, int))], default_gates(), columns("fp32")
    )
    assert row.outcome == "FAIL"


def test_worst_examples_are_the_worst():
    found = records(0.3)
    every = np.concatenate([record.logits.kl for record in found if record.logits is not None])
    examples = worst_examples(found)
    assert len(examples) == 10
    np.testing.assert_allclose([example.kl for example in examples], np.sort(every)[::-1][:10])


def test_columns_follow_the_graphs_a_stage_goes_through(package):
    found = stage_columns(package.variant("int4"))
    assert found["vision"] == "int8"
    assert found["prefill"] == "int4"
    assert set(stage_columns(package.variant("fp32")).values()) == {"fp32"}


def test_json_holds_what_a_reader_needs(package, tmp_path):
    broken = compare_tensors("s9", "cache", "cache", np.ones((1, 2)), np.full((1, 2), np.nan))
    found = report(package, variant(1e-9), variant(0.5, "int8", [broken]))
    file = write_report(found, tmp_path / "out")[0]
    document = strict(file.read_text(encoding="utf-8"))
    assert document["outcome"] == "FAIL"
    assert document["package"]["files"][MANIFEST_NAME] == file_entry(package.path / MANIFEST_NAME).sha256
    assert document["versions"]["numpy"] == np.__version__
    assert document["num_samples"] == 3
    assert document["gates"]["table"]["int8"]["prefill"][1]["metric"] == "kl_mean"
    first, second = document["variants"]
    assert first["not_compared"] == [{"sample": "s0", "stage": "patch_embed", "reason": "not an output"}]
    row = next(row for row in second["rows"] if row["stage"] == "cache")
    assert row["values"]["max_abs"] == "inf"
    assert row["values"]["num_nan"] == 2
    assert row["gates"][0]["would_pass"] == 2
    assert len(second["examples"]) == 10


def test_the_package_keeps_a_copy_bound_to_its_bytes(package, tmp_path):
    write_report(report(package, variant(1e-9)), tmp_path / "out")
    for name in ("report.json", "report.md", "report.html"):
        assert (package.path / "parity" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.md"]
    Package.open(package.path).verify()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_package_that_cannot_be_written_to(package, tmp_path, monkeypatch, number):
    """A read-only one is validated all the same; a full disk is told, with the file, and leaves no half of it."""
    replace = os.replace

    def refuse(source, target):
        if package.path in Path(target).parents:
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    if number == errno.EROFS:
        assert write_report(report(package, variant(1e-9)), tmp_path / "out")[0].is_file()
    else:
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_report(report(package, variant(1e-9)), tmp_path / "out")
        assert caught.value.filename == str(package.path / "parity" / "report.json")
    assert not list((package.path / "parity").glob("*report*"))


def test_markdown_is_made_from_the_json_alone(package):
    document = json.loads(json.dumps(report_json(report(package, variant(0.5, "int8")))))
    text = markdown(document)
    assert "| step_logits | 3 |" in text
    assert "kl_mean" in text
    assert "patch_embed: not an output (1 samples)" in text
    assert math.inf not in document.values()
