"""The quantization bench: its rows are sound, its report survives JSON and becomes tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from layering import ROOT

from benchmarks.document import put_between
from benchmarks.quant import main
from benchmarks.quant_plan import load_plan
from benchmarks.quant_report import SCHEMA, Quality, QuantReport, RowReport, markdown, text
from vlmport.quant.recipe import BUILTIN_NAMES, MIXED_NAME
from vlmport.runtime.errors import InputError
from vlmport.runtime.schema import from_json, to_json

QUALITY = Quality(0.0021, 0.001, 0.003, 0.29, 0.9996, 0.95, 0.94, 1, 2, 0.03, 0.9999)


def report() -> QuantReport:
    plan = load_plan()
    made = RowReport("int4 rtn", "demo", 2_122_577, 4.0, QUALITY, 500.0)
    rows = (made, RowReport("ORT HQQ", "demo", error="no such thing"))
    return QuantReport(SCHEMA, "2026-01-01", {"processors": "2"}, 300, 128, plan.groups, rows)


def test_rows_belong_to_groups_and_names_are_unique() -> None:
    plan = load_plan()
    groups = {group.name for group in plan.groups}
    assert groups == {"demo", "outliers", "int2"}
    assert len({row.name for row in plan.rows}) == len(plan.rows)
    for row in plan.rows:
        assert set(row.groups) <= groups, row.name
        is_file = (ROOT / "benchmarks" / "recipes" / row.recipe).is_file()
        assert row.maker != "vlmport" or is_file or row.recipe in (*BUILTIN_NAMES, MIXED_NAME), row.name
    assert {row.name for row in load_plan(("ORT",)).rows} == {
        row.name for row in plan.rows if row.maker == "onnxruntime"
    }
    assert [group.name for group in load_plan((), ("int2",)).groups] == ["int2"]


@pytest.mark.parametrize(("rows", "groups", "message"), [(("int5",), (), "--rows int5"), ((), ("x",), "--groups x")])
def test_unknown_names_are_told(rows: tuple[str, ...], groups: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_plan(rows, groups)


def test_a_report_survives_json_and_becomes_tables() -> None:
    assert from_json(QuantReport, json.loads(json.dumps(to_json(report())))) == report()
    assert "int4 rtn" in text(report())
    lines = markdown(report()).splitlines()
    (row,) = [line for line in lines if line.startswith("| int4 rtn |")]
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["2,122,577", "0.0021", "0.29", "99.96%", "95.0%", "1"]
    assert any("not made: no such thing" in line for line in lines)
    assert {line.count("|") for line in lines if line.startswith("|")} == {row.count("|")}


def test_promises_are_held_against_the_questions() -> None:
    before = report()
    kept = replace(before.rows[0], name="kept", kl_calibration=0.002, kl_promised=0.0021)
    broken = replace(kept, name="broken", kl_promised=0.002)
    lines = markdown(replace(before, rows=(*before.rows, kept, broken))).splitlines()
    promises = [line for line in lines if line.startswith("- ")]
    said = "- {}: mean KL 2.00e-03 on its calibration pairs, at most {} promised, 2.10e-03 on the questions: {}"
    assert promises == [said.format("kept", "2.10e-03", "kept"), said.format("broken", "2.00e-03", "broken")]
    assert not any(line.startswith("- ") for line in markdown(before).splitlines())


def test_tables_go_between_their_marks(tmp_path: Path) -> None:
    document, file = tmp_path / "doc.md", tmp_path / "report.json"
    file.write_text(json.dumps(to_json(replace(report(), num_items=77))), encoding="utf-8")
    document.write_text("before\n<!-- bench-quant -->\nold\n<!-- /bench-quant -->\nafter\n", encoding="utf-8")
    assert main(["render", str(file), "--into", str(document)]) == 0
    found = document.read_text("utf-8")
    assert found.startswith("before\n")
    assert found.endswith("after\n")
    assert "old" not in found
    assert "77 held-out questions" in found
    with pytest.raises(InputError, match="has no <!-- other -->"):
        put_between(document, "other", "x")


def test_the_document_has_the_marks() -> None:
    assert "<!-- bench-quant -->\n" in (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
