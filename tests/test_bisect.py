"""`--bisect`: planted faults are found at their layer and operator, and a sound package has none."""

from pathlib import Path

import pytest
from planted import FAULTS, QUANTIZED, Fault, plant

from vlmport.export.checkpoint import Checkpoint
from vlmport.export.family import family_of
from vlmport.runtime.package import Package
from vlmport.validate.localise import TappedRequest, localise, tap_reference
from vlmport.validate.reference import load_reference
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
