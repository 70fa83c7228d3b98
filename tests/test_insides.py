"""What a report says of the insides: layers, waterfall, sweep and noise; and a run that goes on where it stopped."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from report_documents import field_names

from vlmport.runtime.model import Model
from vlmport.runtime.package import Package
from vlmport.validate import shards, sweep
from vlmport.validate.gates import default_gates
from vlmport.validate.insides import Plan
from vlmport.validate.journal import Journal
from vlmport.validate.reference import load_reference
from vlmport.validate.report import report_json
from vlmport.validate.run import validate_reference
from vlmport.validate.samples import built_in_samples
from vlmport.validate.shards import JOURNAL_TYPES

TINY_B = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_b"
VARIANTS = ["fp32", "int4"]


def quiet(_done, _total, _what):
    pass


@pytest.fixture(scope="module")
def validated(package_tiny_b, tmp_path_factory):
    """(report, ids of samples that each of two runs asked the reference): the first run is stopped half way."""
    package, folder = Package.open(package_tiny_b), tmp_path_factory.mktemp("journal")
    samples = built_in_samples(package.manifest)[:4]
    asked: list[list[str]] = []

    def run(progress, plan):
        reference = load_reference(TINY_B)
        original, ids = reference.prefill, []
        reference.prefill = lambda prepared: (ids.append(len(prepared.input_ids)), original(prepared))[1]
        asked.append(ids)
        with Journal(folder, "d" * 64, JOURNAL_TYPES) as journal:
            return validate_reference(
                package, TINY_B, reference, samples, None, VARIANTS, default_gates(), progress, journal, plan
            )

    def stop(_done, _total, what):
        if what == "int4, wide":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SHARD", 2)
        with pytest.raises(KeyboardInterrupt):
            run(stop, None)
        whole = run(quiet, None)
    inside = run(quiet, Plan(num_samples=2))
    return whole, inside, asked


def test_a_stopped_run_asks_the_reference_only_for_what_is_missing(validated):
    whole, inside, (first, second, third) = validated
    assert len(first) == 4
    assert len(second) == 2, "the first shard was on record"
    assert len(third) < 8
    for one, other in zip(whole.variants, inside.variants, strict=True):
        *rows, swept = other.rows
        assert [row.stage for row in one.rows] == [row.stage for row in rows]
        assert repr([row.values for row in one.rows]) == repr([row.values for row in rows])
        assert (swept.stage, swept.outcome, swept.values["num_failed"]) == ("sweep", "PASS", 0)


def test_every_layer_has_its_drift(validated):
    _, report, _ = validated
    for variant in report.variants:
        stages = [layer.stage for layer in variant.layers]
        assert stages[0] == "vision_encoder.patch_embed.proj"
        assert {"vision_encoder.blocks.0", "vision_encoder.blocks.1", "decoder.layers.0", "decoder.layers.1"} <= set(
            stages
        )
        assert "runtime.inputs_embeds" in stages
        assert stages[-1] == "decoder.lm_head"
    exact, rounded = (variant.layers[-1].relative_l2 for variant in report.variants)
    assert exact < 1e-5 < rounded


def test_the_waterfall_swaps_one_thing_a_step_and_ends_at_the_variant(validated):
    _, report, _ = validated
    exact, rounded = (variant.waterfall for variant in report.variants)
    steps = {step.name: step for step in rounded.steps}
    assert list(steps)[:3] == ["preprocessing", "export", "dtype"]
    assert list(steps)[-4:] == ["activations", "cache", "kv_cache", "provider"]
    assert "weights:decoder" in steps
    assert steps["export"].cumulative.mean < 1e-9
    assert steps["weights:decoder"].alone.mean > 100 * steps["export"].alone.mean
    assert steps["cache"].cumulative.num_positions == rounded.num_positions == 32
    sums = [step.added.mean for step in rounded.steps if step.skipped is None]
    assert math.isclose(sum(sums), steps["cache"].cumulative.mean, rel_tol=1e-6)
    assert all(step.skipped for step in rounded.steps if step.cumulative is None)
    assert all(step.skipped or step.cumulative.mean < 1e-9 for step in exact.steps)
    assert report.noise.kl.mean > exact.steps[1].cumulative.mean


def test_inputs_that_bite_are_swept(validated):
    _, report, _ = validated
    cases = {row["case"] for row in report.sweep}
    assert cases == {"aspect", "size", "window", "packing", "frames", "chunks", "cache_reuse", "batch"}
    assert [row for row in report.sweep if row["outcome"] == "FAIL"] == []
    skipped = [row for row in report.sweep if row["outcome"] is None]
    assert len(skipped) < len(report.sweep) / 2
    assert all(row["skipped"] for row in skipped)
    packed = [row["id"] for row in report.sweep if row["case"] == "packing" and row["variant"] == "int4"]
    assert packed == ["1 image", *(f"{count} unequal images" for count in range(2, 9))]


def test_one_input_beyond_its_limit_fails_and_none_measured_is_no_evidence(validated):
    rows = validated[1].sweep
    failed = [{**rows[0], "value": 1.0, "outcome": "FAIL"}, *rows[1:]]
    row = sweep.sweep_row(failed, default_gates(), "int4")
    assert (row.outcome, row.worst_sample, row.values["num_failed"]) == ("FAIL", rows[0]["id"], 1)
    assert len(row.notes) == 1
    skipped = [{**each, "value": None, "outcome": None} for each in rows]
    assert sweep.sweep_row(skipped, default_gates(), "fp32").outcome == "FAIL"


def test_an_image_that_feels_its_neighbours_is_caught(package_tiny_b, monkeypatch):
    with Model.load(package_tiny_b, "fp32") as model:
        assert sweep._packing(model, 3, {}) < 1e-5
        original = model.encode_vision

        def leaking(visuals):
            found = original(visuals)
            features = found.features.copy()
            features[-1] += 1e-2 * (len(visuals) - 1)  # of the last image alone
            return replace(found, features=features)

        monkeypatch.setattr(model, "encode_vision", leaking)
        assert sweep._packing(model, 3, {}) > 1e-4


def test_every_field_of_a_real_report_is_explained(validated):
    text = (Path(__file__).parents[1] / "docs" / "report-format.md").read_text(encoding="utf-8")
    document = report_json(validated[1])
    assert document["variants"][-1]["waterfall"]
    assert document["sweep"]
    assert [name for name in sorted(set(field_names(document))) if f"`{name}`" not in text] == []


def test_a_variant_that_failed_is_told_what_to_raise(validated):
    for variant in validated[1].variants:
        assert bool(variant.raises) == (variant.outcome == "FAIL")
    assert any(variant.raises for variant in validated[1].variants)
