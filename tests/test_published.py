"""Published checkpoints by their config.json and tensor tables: traced without weights, every name and shape accounted
for.

A file in published/ is one checkpoint: `config`, its `tensors` by name with shapes, where {n} in a name stands for 0 to
n - 1, and which names are `unused`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tensors_of

from vlmport.export.family import family_of

FILES = sorted((Path(__file__).parent / "published").glob("*.json"))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def expanded(name: str) -> list[str]:
    """All names that one with {n} stands for."""
    found = re.search(r"\{(\d+)\}", name)
    if found is None:
        return [name]
    return [
        each for i in range(int(found[1])) for each in expanded(name[: found.start()] + str(i) + name[found.end() :])
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_tensor_has_its_place_and_shape(file: Path) -> None:
    document = read(file)
    tensors = {each: tuple(shape) for name, shape in document["tensors"].items() for each in expanded(name)}
    unused = {each for name in document["unused"] for each in expanded(name)}
    assert len(tensors) == document["num_tensors"]
    assert unused <= set(tensors)
    family = family_of(document["config"], file)
    normalised = {family.normalise(name): shape for name, shape in tensors.items() if name not in unused}
    assert tensors_of(document["config"]) == normalised
    ignored = [name for name in tensors if family.unused(document["config"], family.normalise(name))]
    assert set(ignored) == unused


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) >= 2
    assert expanded("a.{2}.b.{2}") == ["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"]
