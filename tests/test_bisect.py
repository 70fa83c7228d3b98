"""`--bisect`: planted faults are found at their layer and operator, and a sound package has none."""

import base64
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from planted import FAULTS, QUANTIZED, Fault, noise, plant

from vlmport.cli.main import main
from vlmport.export.checkpoint import Checkpoint
from vlmport.export.family import family_of
from vlmport.runtime.package import Package
from vlmport.validate import bisect
from vlmport.validate.gates import default_gates
from vlmport.validate.golden import load_golden
from vlmport.validate.localise import TappedRequest, localise, tap_reference
from vlmport.validate.moved import moved_channels
from vlmport.validate.points import find_points
from vlmport.validate.reference import load_reference
from vlmport.validate.run_golden import validate_golden
from vlmport.validate.samples import Sample, draw_picture

TINY_A = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_a"
SAMPLE = Sample(
    "two pictures",
    (
        {
            "role": "user",
            "content": [
                {"type": "image", "image": draw_picture(5, 140, 168)},
                {"type": "image", "image": draw_picture(6, 140, 56)},
                {"type": "text", "text": "What differs?"},
            ],
        },
    ),
)


@pytest.fixture(scope="module")
def request_tapped(package_tiny_a, tmp_path_factory) -> TappedRequest:
    checkpoint = Checkpoint.open(TINY_A)
    roles = family_of(checkpoint.config, TINY_A / "config.json").roles(checkpoint.config)
    folder = tmp_path_factory.mktemp("taps")
    return tap_reference(Package.open(package_tiny_a), load_reference(TINY_A), roles, SAMPLE, folder)


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_a_sound_package_has_no_first_fault(package_tiny_a, request_tapped, variant):
    result = localise(Package.open(package_tiny_a), variant, request_tapped)
    assert result.first is None, result.first
    assert result.is_reproduced
    tapped = {(point.role, point.layer) for point in result.points}
    assert {("decoder", layer) for layer in range(3)} <= tapped
    assert {("vision_encoder", layer) for layer in range(4)} <= tapped
    assert {"projector", "embed_tokens"} <= {role for role, _ in tapped}
    assert {point.phase for point in result.points} == {"prompt", "step"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_where_it_is(package_tiny_a, request_tapped, tmp_path, fault: Fault):
    result = localise(Package.open(plant(package_tiny_a, tmp_path, fault, "fp32")), "fp32", request_tapped)
    first = result.first
    assert first is not None
    assert (first.role, first.layer, first.name) == (fault.role, fault.layer, fault.found)


def test_a_fault_is_found_among_the_errors_of_rounding(package_tiny_a, request_tapped, tmp_path):
    result = localise(Package.open(plant(package_tiny_a, tmp_path, QUANTIZED, "int4")), "int4", request_tapped)
    first = result.first
    assert first is not None
    assert (first.role, first.layer, first.name) == (QUANTIZED.role, QUANTIZED.layer, QUANTIZED.found)


@pytest.fixture(scope="module")
def package_awq(package_tiny_a, calibration, tmp_path_factory) -> Path:
    """tiny_a with a variant whose method moved factors from weight to weight, and whose cache is in 8 bits."""
    folder = Path(shutil.copytree(package_tiny_a, tmp_path_factory.mktemp("awq") / "package"))
    arguments = ["quantize", str(folder), "--recipe", "int4", "--method", "awq", "--kv-cache", "int8"]
    assert main([*arguments, "--calibration", str(calibration)]) == 0
    return folder


def test_values_that_a_method_has_scaled_are_no_faults(package_awq, request_tapped, monkeypatch):
    package, variant = Package.open(package_awq), "int4_awq_kv8"
    result = localise(package, variant, request_tapped)
    assert result.first is None, result.first
    assert {point.name for point in result.points} >= {"present.0.key", "present.0.value", "layers.0.mlp.up_proj"}
    assert max(point.accumulated for point in result.points) < 0.5
    monkeypatch.setattr(bisect, "moved_channels", lambda *_: {})
    assert localise(package, variant, request_tapped).first is not None, "nothing was scaled, so nothing was tested"


def test_what_a_graph_notes_of_its_cached_values_is_taken_as_it_is(package_tiny_a):
    """Without any weights: nothing is told from codes where the factors are written down."""
    graph = Package.open(package_tiny_a).graph_path("decoder", "int4")
    model = onnx.load(graph, load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    number = {attribute.name: attribute.i for attribute in attention.attribute}
    (size,) = {value.type.tensor_type.shape.dim[-1].dim_value for value in model.graph.input if "value" in value.name}
    factors = np.random.default_rng(0).uniform(0.5, 2, (number["kv_num_heads"], size)).astype(np.float32)
    noted = base64.b64encode(factors.tobytes()).decode()
    model.metadata_props.add(key=f"{attention.input[4]}.factors", value=noted)
    points = find_points(model.graph, ["layers.0.self_attn.o_proj"])
    moved = moved_channels(model, graph.parent, points, lambda module: None)
    (taken,) = [point.value for point in points if point.side == "in"]
    assert set(moved) == {attention.output[2], taken}
    np.testing.assert_allclose(moved[attention.output[2]], 1 / factors[:, None])
    shared = np.repeat(factors, number["num_heads"] // number["kv_num_heads"], axis=0)
    np.testing.assert_allclose(moved[taken], 1 / shared.ravel())


def test_cached_values_that_a_method_has_scaled_are_compared_by_the_golden_cases(package_awq):
    report = validate_golden(
        Package.open(package_awq), [load_golden(TINY_A)], ["int4_awq_kv8"], default_gates(), lambda *_: None
    )
    (variant,) = report.variants
    errors = [row.values["relative_l2"] for row in variant.rows if row.stage.startswith("past_value")]
    assert len(errors) == 3
    assert max(errors) < 0.3


@pytest.mark.parametrize(
    "fault",
    [
        Fault("norm", "decoder", noise("layers.1.input_layernorm.weight", 0.5), 1, "layers.1.input_layernorm"),
        QUANTIZED,
    ],
    ids=lambda fault: fault.name,
)
def test_a_fault_among_scaled_values_is_found_where_it_is(package_awq, request_tapped, tmp_path, fault: Fault):
    variant = "int4_awq_kv8"
    first = localise(Package.open(plant(package_awq, tmp_path, fault, variant)), variant, request_tapped).first
    assert first is not None
    assert (first.role, first.layer, first.name) == (fault.role, fault.layer, fault.found)
