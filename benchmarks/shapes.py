"""Shapes of checkpoints, as data: shapes/<name>.json holds a config.json and what belongs to it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmport.runtime.errors import InputError

__all__ = ["Shape", "load_shape", "shape_names"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """What a random checkpoint is made after."""

    name: str
    about: str
    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any]
    num_regular_tokens: int  # of the tokenizer; the special ones follow
    published_names: tuple[tuple[str, str], ...]  # pattern and replacement: normalised names to those that the hub has
    documents: Path  # folder of the files that do not depend on the size; its tokenizer.json has no vocabulary

    def published(self, name: str) -> str:
        """The name of a tensor as files on the hub spell it."""
        for pattern, replacement in self.published_names:
            name = re.sub(pattern, replacement, name)
        return name


def shape_names() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in (_FOLDER / "shapes").glob("*.json")))


def load_shape(name: str) -> Shape:
    """The shape of that name. Raises InputError that lists what there is."""
    if name not in shape_names():
        raise InputError(f"shape {name!r} is unknown; known are {', '.join(shape_names())} (benchmarks/shapes)")
    said = json.loads((_FOLDER / "shapes" / f"{name}.json").read_text(encoding="utf-8"))
    return Shape(
        name=name,
        about=said["about"],
        config=said["config"],
        generation_config=said["generation_config"],
        num_regular_tokens=said["num_regular_tokens"],
        published_names=tuple((pattern, replacement) for pattern, replacement in said["published_names"]),
        documents=_FOLDER / "documents" / said["documents"],
    )
