"""The PyTorch reference: the adapter against upstream's own numbers, and a variant against the adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmport.cli.main import main
from vlmport.export.family import families, load_family
from vlmport.runtime.errors import CheckpointError
from vlmport.runtime.model import Model
from vlmport.runtime.package import Package
from vlmport.validate.gates import default_gates
from vlmport.validate.golden import load_golden, request_messages
from vlmport.validate.reference import load_reference
from vlmport.validate.run import validate_reference
from vlmport.validate.samples import Sample, built_in_samples, draw_picture

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"


def quiet(_done, _total, _what):
    pass


@pytest.fixture(scope="module")
def reference():
    return load_reference(GOLDENS / "tiny_b")


@pytest.fixture(scope="module")
def report(package_tiny_b, reference):
    package = Package.open(package_tiny_b)
    samples = built_in_samples(package.manifest)
    return validate_reference(
        package, GOLDENS / "tiny_b", reference, samples, None, ["fp32", "int4"], default_gates(), quiet
    )


def test_the_adapter_computes_what_upstream_did(package_tiny_b, reference):
    golden = load_golden(GOLDENS / "tiny_b")
    with Model.load(package_tiny_b, video_rule=reference.video_rule) as model:
        for name in ("image_upscale", "three_images", "multi_turn"):
            case = golden.cases[name]
            prepared = model.prepare(request_messages(golden, case), case.request["options"])
            stages = {(e.stage, e.part is None): golden.tensors[e.tensor] for e in case.stages}
            vision, features = reference.vision(prepared.visuals)
            np.testing.assert_allclose(vision, stages["vision", True], atol=2e-5)
            np.testing.assert_allclose(features, stages["projector_image", True], atol=2e-5)
            logits, embeds, positions = reference.prefill(prepared)
            np.testing.assert_allclose(logits[-1], stages["prefill_logits_last", True], atol=2e-5)
            np.testing.assert_array_equal(positions, stages["position_ids", True])
            assert embeds.shape[0] == len(case.input_ids)
            for step, token in enumerate(case.generated_ids[:-1], 1):
                np.testing.assert_allclose(reference.step(token), stages["step_logits", True][step], atol=2e-5)


def test_the_adapter_follows_the_rule_it_names_for_clips(package_tiny_b, reference):
    golden = load_golden(GOLDENS / "tiny_b")
    alternatives = {
        name.rsplit("_", 1)[1]: alternative
        for name, alternative in golden.alternatives.items()
        if name.startswith("mrope_transformers_")
    }
    rule = reference.video_rule.rsplit("-", 1)[1]
    (alternative,) = [found for version, found in alternatives.items() if version.startswith(rule)]
    assert alternative.cases
    with Model.load(package_tiny_b, video_rule=reference.video_rule) as model:
        for name, case in alternative.cases.items():
            prepared = model.prepare(
                request_messages(golden, golden.cases[name]), golden.cases[name].request["options"]
            )
            stages = {entry.stage: golden.tensors[entry.tensor] for entry in case.stages}
            logits, _, positions = reference.prefill(prepared)
            np.testing.assert_array_equal(positions, stages["position_ids"])
            np.testing.assert_array_equal(prepared.position_ids, stages["position_ids"])
            np.testing.assert_allclose(logits[-1], stages["prefill_logits_last"], atol=2e-5)


def test_a_prompt_leaves_nothing_behind_for_the_next(package_tiny_b, reference):
    samples = {sample.id: sample for sample in built_in_samples(Package.open(package_tiny_b).manifest)}
    with Model.load(package_tiny_b, video_rule=reference.video_rule) as model:
        text = model.prepare(samples["text"].messages)
        alone = [reference.prefill(text)[0][-1], reference.step(5)]
        reference.prefill(model.prepare(samples["clip"].messages))
        again = [reference.prefill(text)[0][-1], reference.step(5)]
    np.testing.assert_array_equal(alone, again)


def test_float32_passes_at_every_stage(report):
    variant = report.variants[0]
    assert variant.outcome == "PASS", [row for row in variant.rows if row.outcome != "PASS"]
    rows = {row.stage: row for row in variant.rows}
    expected = {"inputs", "pixel_values", "image_grid_thw", "position_ids", "vision", "projector", "inputs_embeds"}
    assert expected | {"prefill_logits", "step_logits", "cache", "generated_ids"} == set(rows)
    assert rows["vision"].num_samples == len(report.samples) - 1  # all but the text alone
    assert rows["prefill_logits"].values["max_abs"] <= 1e-4
    assert rows["pixel_values"].values["max_abs"] == 0
    assert rows["step_logits"].values["kl_max"] < 1e-6


def test_int4_is_told_apart_from_float32(report):
    float32, int4 = report.variants
    rows, low = ({row.stage: row for row in variant.rows} for variant in (float32, int4))
    assert low["prefill_logits"].column == "int4"
    assert low["vision"].column == "int8"  # its graphs hold 8-bit weights
    assert low["step_logits"].values["kl_mean"] > 100 * rows["step_logits"].values["kl_mean"]
    assert low["pixel_values"].outcome == "PASS"
    assert int4.examples[0].kl == max(example.kl for example in int4.examples)


def test_other_weights_fail(package_tiny_b, tmp_path, reference):
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(GOLDENS / "tiny_b", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    key = next(key for key in tensors if key.endswith("merger.mlp.2.bias"))
    save_file({**tensors, key: tensors[key] + 1e-2}, other / "model.safetensors", metadata={"format": "pt"})
    sample = Sample("s", [{"role": "user", "content": [{"type": "image", "image": draw_picture(1, 84, 56)}]}], 4)
    report = validate_reference(
        Package.open(package_tiny_b), other, load_reference(other), [sample], None, ["fp32"], default_gates(), quiet
    )
    outcomes = {row.stage: row.outcome for row in report.variants[0].rows}
    assert outcomes["vision"] == "PASS"  # the fault lies behind it
    assert outcomes["projector"] == "FAIL"
    assert report.outcome == "FAIL"


def test_samples_are_the_same_everywhere(package_tiny_b):
    manifest = Package.open(package_tiny_b).manifest
    first, second = built_in_samples(manifest), built_in_samples(manifest)
    assert len({sample.id for sample in first}) == len(first)
    pictures = [part["image"] for sample in first for part in sample.messages[0]["content"] if "image" in part]
    again = [part["image"] for sample in second for part in sample.messages[0]["content"] if "image" in part]
    assert [a.tobytes() for a in pictures] == [b.tobytes() for b in again]
    assert len({picture.size for picture in pictures}) == len(pictures)
    assert isinstance(pictures[0], Image.Image)


@pytest.mark.parametrize("name", families())
def test_adapters_that_a_family_names_can_be_imported(name):
    import importlib

    for adapter in (load_family(name).reference, load_family(name).remote):
        assert adapter is None or callable(importlib.import_module(f"vlmport.export.families.{adapter}").load)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'), "not supported"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json: missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (truncate, "truncated"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_status_2(damage, words, package_tiny_b, tmp_path, capsys):
    checkpoint = shutil.copytree(GOLDENS / "tiny_b", tmp_path / "checkpoint")
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=words):
        load_reference(checkpoint)
    assert main(["validate", str(package_tiny_b), "--reference", str(checkpoint)]) == 2
    assert words in capsys.readouterr().err


def test_the_command_writes_the_report_where_it_says(package_tiny_b, tmp_path, capsys):
    package = shutil.copytree(package_tiny_b, tmp_path / "package")
    arguments = ["validate", str(package), "--reference", str(GOLDENS / "tiny_b"), "--variant", "fp32"]
    assert main([*arguments, "--limit", "2", "--bisect", "--report", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "prefill_logits" in printed
    assert "no operator leaves its tolerance" in printed
    document = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert document["mode"] == "reference"
    assert document["provider"] == "CPUExecutionProvider"
    assert (package / "parity" / "report.json").is_file()
