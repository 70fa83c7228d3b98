"""What a family file must say: the contract between `families/<model_type>.py` and the exporter.

A family is one file that exposes `FAMILY = FamilySpec(...)`. Families are found by listing the folder, and asked in
turn whether a config.json is theirs; nothing else in the project knows their names.
"""

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..runtime.errors import CheckpointError
from ..runtime.manifest import (
    CacheSpec,
    GenerationDefaults,
    ImageSpec,
    PositionSpec,
    PromptSpec,
    VideoSpec,
    VisionSpec,
)

__all__ = [
    "FamilySpec",
    "Json",
    "ManifestParts",
    "Port",
    "RoleSpec",
    "RowBlocks",
    "TensorRef",
    "families",
    "family_of",
    "load_family",
    "roles_of",
]

Json = dict[str, Any]


@dataclass(frozen=True)
class Port:
    """One input or output of a graph. `shape` mixes sizes and names of dynamic dims."""

    name: str
    dtype: str  # "float32", "int64", "int32", or "compute" for that of the target
    shape: tuple[int | str, ...]
    default: tuple[int, ...] | None = None  # an input that may be left out, and its int64 value


@dataclass(frozen=True)
class RowBlocks:
    """Every block of `size` rows, `stride` rows apart from row `start` on: one part of a fused tensor."""

    start: int
    size: int
    stride: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor of the checkpoint, by its normalised name and the shape that the configuration implies.

    `rows`: the parameter is those rows of it; None is the whole tensor. `transposed`: it is the matrix turned over.
    `hint`: what a user is told, in place of a list of names, where all tensors of one hint are missing.
    """

    name: str
    shape: tuple[int, ...]
    rows: RowBlocks | None = None
    transposed: bool = False
    hint: str = ""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class RoleSpec:
    """One graph of a package."""

    build: Callable[[], nn.Module]  # called under fake tensors: allocates nothing
    inputs: tuple[Port, ...]  # in the order of the module's forward; `variadic` gathers the last ones into one list
    outputs: tuple[Port, ...]
    tensor: Callable[[str, tuple[int, ...]], TensorRef]  # parameter name and shape -> where its values are
    variadic: int = 0  # how many of the last inputs form one list argument
    multiples: Mapping[str, int] = field(default_factory=dict[str, int])  # dims that are so much times one number


@dataclass(frozen=True)
class ManifestParts:
    """What the runtime needs to know of a checkpoint of this family."""

    image: ImageSpec | None = None
    video: VideoSpec | None = None
    vision: VisionSpec | None = None
    prompt: PromptSpec | None = None
    positions: PositionSpec | None = None
    cache: CacheSpec | None = None
    generation: GenerationDefaults | None = None
    template: str | None = None  # chat template where upstream takes not the checkpoint's own; Jinja
    template_prologue: str = ""  # Jinja in front of the template, for what upstream does to messages before it


def _as_it_is(config: Json, documents: Mapping[str, Json]) -> Json:
    del documents
    return config


@dataclass(frozen=True)
class FamilySpec:
    """A family of checkpoints: how to recognise, trace, fill and describe them."""

    name: str  # the model_type; the module has it in lower case, with "_" for what a module's name cannot have
    matches: Callable[[Json], bool]  # config.json -> is it ours
    roles: Callable[[Json], Mapping[str, RoleSpec]]  # config.json -> graphs; CheckpointError names a bad field
    manifest: Callable[[Json, Mapping[str, Json]], ManifestParts]  # config.json, the other JSON files by name
    normalise: Callable[[str], str]  # tensor name in a file -> the one name the family uses
    unused: Callable[[Json, str], bool]  # normalised tensor names that are left out on purpose
    tiny_config: Json  # a config.json small enough for tests
    completed: Callable[[Json, Mapping[str, Json]], Json] = _as_it_is  # config.json with what roles need of other files
    reference: str | None = None  # module beside the family that adapts transformers' class; None: own modules
    remote: str | None = None  # the same for the Python files that checkpoints bring, run where the user trusts them


def roles_of(family: FamilySpec, config: Json, documents: Mapping[str, Json]) -> Mapping[str, RoleSpec]:
    """The graphs of a checkpoint, by its config.json and its other JSON files by name. Raises CheckpointError."""
    return family.roles(family.completed(config, documents))


def families() -> tuple[str, ...]:
    """The module names of all families: those in families/ that do not start with an underscore."""
    folder = Path(__file__).parent / "families"
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


def load_family(name: str) -> FamilySpec:
    """The FAMILY of families/<name>.py."""
    module = importlib.import_module(f"{__package__}.families.{name}")
    spec: FamilySpec = module.FAMILY
    return spec


def family_of(config: Json, where: Path) -> FamilySpec:
    """The family whose `matches` accepts config.json. Raises CheckpointError that lists the known ones."""
    for name in families():
        spec = load_family(name)
        if spec.matches(config):
            return spec
    known = ", ".join(load_family(name).name for name in families())
    raise CheckpointError(f"{where}: model_type {config.get('model_type')!r} is not supported; known ones are {known}")
