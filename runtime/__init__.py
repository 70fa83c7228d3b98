"""Runs packages: `load("package").generate(messages)`. Needs numpy, tokenizers, pillow, jinja2 and an onnxruntime."""

from .errors import (
    CapacityError,
    CheckpointError,
    InputError,
    MissingDependencyError,
    PackageError,
    RecipeError,
    VlmportError,
)
from .generate import Generation, GenerationOptions, GenerationStream, Timings
from .model import Model
from .sample import SamplingParams

__all__ = [
    "CapacityError",
    "CheckpointError",
    "Generation",
    "GenerationOptions",
    "GenerationStream",
    "InputError",
    "MissingDependencyError",
    "Model",
    "PackageError",
    "RecipeError",
    "SamplingParams",
    "Timings",
    "VlmportError",
    "load",
]

load = Model.load
