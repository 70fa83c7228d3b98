"""What a variant computes for images, in a package without a decoder. Runtime only: no torch, no safetensors.

Dims: I images, N patches of all images, D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..runtime.image import Patches
from ..runtime.model import Model

__all__ = ["ImageStages", "run_images"]

Array = NDArray[Any]


@dataclass(frozen=True)
class ImageStages:
    """Outputs of the graphs for some images, float32."""

    vision: Array  # [N, D]
    pooled: Array  # [I, D]
    logits: Array | None  # [I, C]; None: no classifier


def run_images(model: Model, patches: Sequence[Patches]) -> ImageStages:
    """All stages of a variant, by one packed call."""
    seen = model.encode_vision(patches)
    logits = model.classify(seen.features) if "classifier" in model.manifest.roles else None
    assert seen.vision is not None, "who sees images alone has a vision encoder"
    return ImageStages(seen.vision, seen.features, logits)
