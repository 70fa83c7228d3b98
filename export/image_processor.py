"""How a checkpoint cuts images into patches: sizes that the graphs have, and the image processor's own settings.

A setting that upstream's processor obeys is obeyed here or refused; what the files leave out is as its class has it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..runtime.errors import CheckpointError
from ..runtime.manifest import ImageSpec
from .family import Json
from .fields import read_field, read_numbers, read_size

__all__ = ["PatchGeometry", "image_processor", "smart_resize_spec"]

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class PatchGeometry:
    """Sides of a patch in pixels, of a merge block in patches, and frames a patch."""

    channels: int
    patch_size: int
    merge_size: int
    num_frames: int  # temporal_patch_size

    @property
    def patch_dim(self) -> int:
        """Values of a patch: a row of pixel_values."""
        return math.prod(self.kernel)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape of the patch embedding's kernel without its first axis, as checkpoints store it."""
        return (self.channels, self.num_frames, self.patch_size, self.patch_size)

    @property
    def block(self) -> int:
        """Patches of a merge block: as many rows become one token."""
        return self.merge_size**2


def image_processor(documents: Mapping[str, Json]) -> Json:
    """Settings of the image processor: preprocessor_config.json, or as transformers 5 saves them.

    Raises CheckpointError where the checkpoint has neither: sizes and colours that are guessed change answers.
    """
    own = documents.get("preprocessor_config.json") or documents.get("processor_config.json", {}).get("image_processor")
    if not isinstance(own, dict):
        raise CheckpointError(
            "preprocessor_config.json: missing (and no image_processor in processor_config.json); "
            "copy it from the checkpoint that this one was tuned from"
        )
    return own


def smart_resize_spec(processor: Json, geometry: PatchGeometry) -> ImageSpec:
    """The ImageSpec of a Qwen2-VL image processor. `size` of newer files holds pixel counts under names of edges.

    Raises CheckpointError where it leaves out a step, or cuts patches of another size than the graphs take.
    """
    file = "preprocessor_config.json"
    if skipped := [step for step in _STEPS if not read_field(processor, step, bool, True, file=file)]:
        raise CheckpointError(f"{file}: {skipped[0]} is false, which is not supported; every step must be on")
    sizes = {
        "patch_size": geometry.patch_size,
        "temporal_patch_size": geometry.num_frames,
        "merge_size": geometry.merge_size,
    }
    for name, size in sizes.items():
        found = read_size(processor, name, size, file=file)
        if found != size:
            raise CheckpointError(f"{file}: {name} is {found}, config.json says {size}; copy both from one checkpoint")
    if geometry.channels != 3:
        raise CheckpointError(f"config.json: vision_config.in_channels is {geometry.channels}; images have 3 (RGB)")
    resample = read_field(processor, "resample", int, 3, file=file)
    if resample not in _RESAMPLE:
        raise CheckpointError(f"{file}: resample is {resample}; known are {', '.join(map(str, _RESAMPLE))}")
    low = read_size(processor, "min_pixels", read_size(processor, "size.shortest_edge", 56 * 56, file=file), file=file)
    high = read_size(
        processor, "max_pixels", read_size(processor, "size.longest_edge", 28 * 28 * 1280, file=file), file=file
    )
    if low > high:
        raise CheckpointError(f"{file}: min_pixels {low} is over max_pixels {high}; raise max_pixels")
    return ImageSpec(
        strategy="smart_resize",
        patch_size=geometry.patch_size,
        temporal_patch_size=geometry.num_frames,
        merge_size=geometry.merge_size,
        min_pixels=low,
        max_pixels=high,
        mean=read_numbers(processor, "image_mean", _CLIP_MEAN, file=file),
        std=read_numbers(processor, "image_std", _CLIP_STD, file=file),
        rescale=read_field(processor, "rescale_factor", float, 1 / 255, file=file),
        resample=_RESAMPLE[resample],
    )
