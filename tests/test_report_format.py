"""docs/report-format.md names every field that a report has, and the schema."""

import dataclasses
import re

import pytest
from layering import ROOT
from report_documents import document, field_names, variant

from vlmport.validate import (
    bisect,
    gates,
    inputs,
    insides,
    intervals,
    metrics,
    raises,
    report,
    statistics,
    sweep,
    waterfall,
)

TEXT = (ROOT / "docs" / "report-format.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`]+)`", TEXT))
PARTS = (
    *(report.Example, report.TaskScore, report.VariantReport, gates.Gate, gates.GateResult, inputs.InputProof),
    *(intervals.Ratio, intervals.Interval, statistics.KlSummary, statistics.StepKl, statistics.Divergence),
    *(statistics.Statistics, metrics.TensorMetrics, insides.LayerDrift, insides.Noise, raises.Raise, waterfall.Added),
    *(waterfall.Step, waterfall.Waterfall, bisect.OperatorError, sweep.SweepResult),
)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_of_every_part_is_explained(part: type) -> None:
    assert [field.name for field in dataclasses.fields(part) if field.name not in NAMED] == []


def test_every_field_of_a_report_is_explained() -> None:
    found = set(field_names(document(variant("int4", 1e-2, "FAIL"))))
    assert len(found) > 60
    assert found - NAMED == set()


def test_the_schema_is_the_one_that_is_written() -> None:
    assert {name for name in NAMED if name.startswith("vlmport-report/")} == {report.REPORT_SCHEMA}
