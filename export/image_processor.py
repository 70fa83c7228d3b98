"""How a checkpoint cuts images into patches: sizes that the graphs have, and the image processor's own settings.

A setting that upstream's processor obeys is obeyed here or refused; what the files leave out is as its class has it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..runtime.errors import CheckpointError
from ..runtime.manifest import ImageSpec, SquareSpec
from .family import Json
from .fields import read_field, read_numbers, read_size

__all__ = ["PatchGeometry", "fixed_area_spec", "image_processor", "smart_resize_spec", "square_spec"]

_FILE = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
# Of transformers' CLIPImageProcessor (and LlavaImageProcessor) and SiglipImageProcessor, for what a file leaves out.
_CLIP_PROCESSOR: Json = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": list(_CLIP_MEAN),
    "image_std": list(_CLIP_STD),
}
_SIGLIP_PROCESSOR: Json = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


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
    file = _FILE
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
        resample=_resample(processor),
    )


def fixed_area_spec(processor: Json, *, patch_size: int, merge_size: int) -> ImageSpec:
    """The ImageSpec of EVEv2, which scales images to the area of a square of `max_size` pixels by itself.

    Its CLIP processor then only normalises. Raises CheckpointError where it would resize or crop once more.
    """
    wanted = {"do_resize": False, "do_center_crop": False, "do_rescale": True, "do_normalize": True}
    for step, value in wanted.items():
        if (found := read_field(processor, step, bool, True, file=_FILE)) != value:
            raise CheckpointError(f"{_FILE}: {step} is {str(found).lower()}, which is not supported here; set it")
    pixels = read_size(processor, "max_size", file=_FILE) ** 2
    return ImageSpec(
        strategy="fixed_area",
        patch_size=patch_size,
        temporal_patch_size=1,
        merge_size=merge_size,
        min_pixels=pixels,
        max_pixels=pixels,
        mean=read_numbers(processor, "image_mean", _CLIP_MEAN, file=_FILE),
        std=read_numbers(processor, "image_std", _CLIP_STD, file=_FILE),
        rescale=read_field(processor, "rescale_factor", float, 1 / 255, file=_FILE),
        resample="bicubic",  # Pillow's own default, whatever `resample` says
    )


def square_spec(processor: Json, side: int, patch_size: int, *, merge_size: int = 1, pads: bool = False) -> ImageSpec:
    """The ImageSpec of an image processor of CLIP, SigLIP or LLaVA, for a tower that takes squares of `side` pixels.

    `pads`: whether images are padded to squares first, which not every class does that has a field for it. Raises
    CheckpointError where the file leaves out a step, or gives images of another size than the tower takes.
    """
    kind = read_field(processor, "image_processor_type", str, "CLIPImageProcessor", file=_FILE)
    own = {name: value for name, value in processor.items() if value is not None}
    said = {**(_SIGLIP_PROCESSOR if kind.startswith("Siglip") else _CLIP_PROCESSOR), **own}
    if skipped := [step for step in _STEPS if not read_field(said, step, bool, True, file=_FILE)]:
        raise CheckpointError(f"{_FILE}: {skipped[0]} is false, which is not supported; every step must be on")
    mean = read_numbers(said, "image_mean", file=_FILE)
    strategy, resized = _square_steps(said, side, pads)
    return ImageSpec(
        strategy=strategy,
        patch_size=patch_size,
        temporal_patch_size=1,
        merge_size=merge_size,
        min_pixels=side**2,
        max_pixels=side**2,
        mean=mean,
        std=read_numbers(said, "image_std", file=_FILE),
        rescale=read_field(said, "rescale_factor", float, 1 / 255, file=_FILE),
        resample=_resample(said),
        square=SquareSpec(side, resized, (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))),
    )


def _square_steps(said: Json, side: int, pads: bool) -> tuple[str, int]:
    """The strategy that makes squares of `side`, and the short side before the crop.

    `size` is {"shortest_edge"}, {"height", "width"} or, in older files, a number: the shortest edge. `crop_size` is
    {"height", "width"} or a number.
    """
    size, square = _lengths(said, "size", ("shortest_edge",)), {"height": side, "width": side}
    crops = read_field(said, "do_center_crop", bool, file=_FILE)
    cropped = _lengths(said, "crop_size", ("height", "width")) if crops else None
    short = size.get("shortest_edge", 0)
    if size == square and cropped in (None, square):
        return ("pad_square" if pads else "stretch"), side
    if set(size) == {"shortest_edge"} and ((cropped == square and short >= side) or (pads and short == side)):
        return ("pad_square" if pads else "center_crop"), short
    crop = f"cropped to {cropped}" if crops else "without a center crop"
    raise CheckpointError(
        f"{_FILE}: size {size} {crop} does not give what the vision tower takes, {side} x {side} pixels; copy the file "
        "from the checkpoint that this one was tuned from"
    )


def _lengths(said: Json, name: str, sides: tuple[str, ...]) -> dict[str, int]:
    """`size` or `crop_size` by the names of sides; a number is the length of all `sides`."""
    if not isinstance(said[name], dict):
        return dict.fromkeys(sides, read_size(said, name, file=_FILE))
    return {side: read_size(said, f"{name}.{side}", file=_FILE) for side, length in said[name].items() if length}


def _resample(processor: Json) -> Resample:
    resample = read_field(processor, "resample", int, 3, file=_FILE)
    if resample not in _RESAMPLE:
        raise CheckpointError(f"{_FILE}: resample is {resample}; known are {', '.join(map(str, _RESAMPLE))}")
    return _RESAMPLE[resample]
