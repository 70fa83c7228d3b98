"""Packages without a decoder: what a variant makes of images, against a reference that encodes each by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.encode import EncodeOptions, prepare_images
from ..runtime.image import Patches
from ..runtime.manifest import ImageSpec
from ..runtime.model import Model
from .compare import Comparison, NotCompared, compare_logits, compare_tensors
from .image_stages import ImageStages, run_images
from .inputs import GivenInputs, compare_inputs, image_hashes
from .samples import draw_picture

__all__ = [
    "EncodingReference",
    "ImageReference",
    "ImageSample",
    "built_in_images",
    "compare_image_sample",
]

Array = NDArray[Any]
Record = Comparison | NotCompared


@dataclass(frozen=True)
class ImageSample:
    """Images to encode in one call."""

    id: str
    images: tuple[Image.Image, ...]


class EncodingReference(Protocol):
    """What variants are compared with: a checkpoint in PyTorch, or another package."""

    origin: str  # whose code it is, for the report

    def encode(self, patches: Patches) -> ImageStages:
        """One image by itself, whatever it is packed with in the package."""
        ...


class ImageReference(EncodingReference, Protocol):
    """A checkpoint in PyTorch, float32, to be looked into."""

    def modules(self) -> Mapping[str, Any]:
        """Its torch modules, to be tapped: see reference_taps.TappedReference."""
        ...

    def row_order(self, role: str, patches: Sequence[Patches]) -> Array | None:
        """See reference_taps.TappedReference."""
        ...


def built_in_images() -> tuple[ImageSample, ...]:
    """Drawn pictures of several shapes: alone, in pairs, and many of all sizes in one call."""
    sizes = ((112, 84), (301, 60), (75, 240), (33, 47), (16, 16), (200, 200), (64, 48), (140, 28))
    pictures = [draw_picture(number, width, height) for number, (width, height) in enumerate(sizes)]
    named = (("picture", 0), ("wide", 1), ("tall", 2))
    samples = [ImageSample(name, (pictures[number],)) for name, number in named]
    return (*samples, ImageSample("two pictures", tuple(pictures[3:5])), ImageSample("many sizes", tuple(pictures)))


def compare_image_sample(
    model: Model, sample: ImageSample, reference: EncodingReference, spec: ImageSpec | None
) -> tuple[GivenInputs, list[Record]]:
    """One packed call of the variant against the reference, whose images are cut up as `spec` says."""
    given, _ = prepare_images(spec, sample.images, EncodeOptions())
    patches, _ = prepare_images(model.manifest.image, sample.images, EncodeOptions())
    inputs = GivenInputs(sample.id, image_hashes(given), image_hashes(patches))
    found = run_images(model, patches)
    alone = [reference.encode(item) for item in given]
    vision, pooled = (np.concatenate([getattr(one, name) for one in alone]) for name in ("vision", "pooled"))
    records: list[Record] = [
        compare_inputs(inputs),
        compare_tensors(sample.id, "vision", "vision", vision, found.vision),
        compare_tensors(sample.id, "pooled", "projector", pooled, found.pooled),
    ]
    logits = [one.logits for one in alone if one.logits is not None]
    if found.logits is not None and logits:
        records.append(compare_logits(sample.id, "logits", "classes", np.concatenate(logits), found.logits))
    records.append(NotCompared(sample.id, "pixel_values", "the reference has no image processor of its own"))
    return inputs, records
