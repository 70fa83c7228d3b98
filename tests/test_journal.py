"""The journal of a validation: what was found is found again, a torn line is not, other inputs have another file."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vlmport.validate.compare import Comparison, NotCompared, compare_logits, compare_tensors
from vlmport.validate.journal import Journal, digest_of
from vlmport.validate.metrics import LogitErrors, TensorErrors

TYPES = (Comparison, NotCompared, TensorErrors, LogitErrors)


@pytest.fixture
def records():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 8)), random.normal(size=(3, 8))
    b[0, 0] = np.inf
    return [
        compare_tensors("s", "vision", "vision", a, b),
        compare_logits("s", "step_logits", "decode", a, a + 0.1 * a),
        NotCompared("s", "pixel_values", "no processor"),
    ]


def test_records_come_back_as_they_were(tmp_path, records):
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        journal.append("s", "int4", records)
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        assert ("s", "int4") in journal
        assert ("s", "fp32") not in journal
        found = journal.read("s", "int4")
    assert found[2] == records[2]
    np.testing.assert_array_equal(found[1].logits.kl, records[1].logits.kl)
    assert found[1].logits.same.dtype == bool
    assert found[0].tensor.max_abs == np.inf


def test_a_torn_line_is_dropped_and_the_next_one_is_whole(tmp_path, records):
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        journal.append("a", "int4", records)
        journal.append("b", "int4", records)
        file = journal.file
    file.write_bytes(file.read_bytes()[:-20])
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        assert ("a", "int4") in journal
        assert ("b", "int4") not in journal
        journal.append("b", "int4", records)
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        assert len(journal.read("b", "int4")) == 3


def test_records_of_other_fields_are_another_file(tmp_path, records):
    """A version that adds a field, or gives one another type, starts anew."""
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        journal.append("s", "int4", records)
    fields = [(field.name, field.type) for field in dataclasses.fields(NotCompared)]
    for changed in ([*fields, ("more", str)], [*fields[:-1], ("reason", int)]):
        other = dataclasses.make_dataclass("NotCompared", changed, frozen=True)
        with Journal(tmp_path, "d" * 64, (*(kind for kind in TYPES if kind is not NotCompared), other)) as journal:
            assert ("s", "int4") not in journal
    with Journal(tmp_path, "d" * 64, TYPES) as journal:
        assert ("s", "int4") in journal


def test_other_inputs_have_another_digest():
    picture, other = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")
    digests = [
        digest_of({"messages": [{"image": image}], "variants": [name]}) for image in (picture, other) for name in "ab"
    ]
    assert len(set(digests)) == 4
    assert digest_of({"messages": [{"image": picture.copy()}], "variants": ["a"]}) == digests[0]
