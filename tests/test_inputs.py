"""The proof that reference and variant were given the same: digests of each side's own arrays, and a gate on them."""

from dataclasses import replace

import numpy as np
import pytest

from vlmport.runtime.generate import Timings
from vlmport.runtime.image import Patches
from vlmport.runtime.positions import VisualRun
from vlmport.runtime.prepare import Prepared
from vlmport.validate.compare import stage_rows
from vlmport.validate.gates import default_gates
from vlmport.validate.inputs import GivenInputs, compare_inputs, hash_of, input_hashes, prove, rolled_up


def prompt() -> Prepared:
    pixels = np.arange(48, dtype=np.float32).reshape(4, 12)
    return Prepared(
        text="",
        input_ids=np.array([1, 9, 9, 2]),
        visuals=(Patches(pixels, (1, 2, 2)),),
        runs=(VisualRun("image", 1, (1, 1, 2)),),
        position_ids=np.arange(4),
        rope_delta=0,
        timings=Timings(),
    )


def other_pixel(prepared: Prepared) -> Prepared:
    (patches,) = prepared.visuals
    pixels = patches.pixel_values.copy()
    pixels[-1, -1] = np.nextafter(pixels[-1, -1], np.float32(0))
    return replace(prepared, visuals=(replace(patches, pixel_values=pixels),))


CHANGES = {
    "pixel_values": other_pixel,
    "input_ids": lambda prepared: replace(prepared, input_ids=np.array([1, 9, 9, 3])),
    "position_ids": lambda prepared: replace(prepared, position_ids=np.array([0, 1, 2, 4])),
    "visual_runs": lambda prepared: replace(prepared, runs=(VisualRun("image", 0, (1, 1, 2)),)),
    "grids": lambda prepared: replace(prepared, visuals=(replace(prepared.visuals[0], grid=(1, 4, 1)),)),
}


def test_one_bit_in_one_input_is_found() -> None:
    same = input_hashes(prompt())
    assert set(same) == set(CHANGES)
    for name, change in CHANGES.items():
        other = input_hashes(change(prompt()))
        assert [key for key in same if same[key] != other[key]] == [name]


def test_digests_are_of_values_and_shapes_not_of_how_they_are_held() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert hash_of([rows]) == hash_of([np.asfortranarray(rows)]) == hash_of([rows.astype(np.float64)])
    assert hash_of([rows]) != hash_of([rows.reshape(3, 2)])
    assert hash_of([rows]) != hash_of([rows.astype(np.int64)])
    assert hash_of([rows]) != hash_of([rows[:1], rows[1:]])
    assert hash_of([np.arange(3, dtype=np.int32)]) == hash_of([np.arange(3)])


@pytest.mark.parametrize("column", ["fp32", "fp16", "int8", "int4"])
def test_a_difference_fails_the_gate_and_is_named(column: str) -> None:
    reference = input_hashes(prompt())
    given = [
        GivenInputs("a", reference, reference),
        GivenInputs("b", reference, input_hashes(other_pixel(prompt()))),
        GivenInputs("c", {}, reference),  # a side that tells nothing is no evidence
    ]
    outcomes = [stage_rows([compare_inputs(one)], default_gates(), {"exact": column})[0].outcome for one in given]
    assert outcomes == ["PASS", "FAIL", "FAIL"]
    assert "pixel_values" in compare_inputs(given[1]).note
    proof = prove(given)
    assert (proof.num_samples, proof.num_equal) == (3, 1)
    assert proof.different[0] == {
        "sample": "b",
        "input": "pixel_values",
        "reference": reference["pixel_values"],
        "variant": given[1].variant["pixel_values"],
    }
    assert {each["reference"] for each in proof.different if each["sample"] == "c"} == {None}


def test_the_digest_over_all_is_equal_only_where_all_are() -> None:
    reference = input_hashes(prompt())
    found = [("a", reference), ("b", reference)]
    assert prove([GivenInputs(sample, each, each) for sample, each in found]).sha256 == rolled_up(found)
    assert rolled_up(found) != rolled_up(found[::-1]) != rolled_up(found[:1])
