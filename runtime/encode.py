"""Images alone, for packages without a decoder: one embedding an image, and class scores where there is a classifier.

    I  images     N  patches of all images of a call     D  width     C  classes

All images of a call lie in one sequence, whatever their sizes, and attention keeps to the bounds of each: there is
nothing to pad, and what an image gets does not depend on the others. `max_patches` bounds the memory of a call; images
that are over it together go through in several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from .errors import CapacityError, InputError, PackageError
from .generate import Timings
from .image import ImageOptions, ImageSource, Patches, load_image, preprocess_images, source_label
from .manifest import ImageSpec
from .session import Array
from .token_drop import drop_patches

__all__ = ["EncodeOptions", "ImageEncoding", "VisionOutput", "encode_patches", "next_fit", "prepare_images"]


@dataclass(frozen=True)
class VisionOutput:
    """What the vision side computed: `vision` float32 [P, C] in natural patch order, `features` float32 [R, D]."""

    vision: Array | None  # None: there is no vision encoder
    features: Array
    timings: Timings  # vision and projector alone


@dataclass(frozen=True)
class EncodeOptions:
    """How images are cut up, thinned out and packed."""

    image: ImageOptions = field(default_factory=ImageOptions)
    token_drop: float | Sequence[float] = 0.0  # share of patches to leave out; of all images, or one an image
    seed: int | None = None  # of token dropping; None draws anew
    max_patches: int | None = None  # of one call; None packs everything into one

    def __post_init__(self) -> None:
        if self.max_patches is not None and self.max_patches < 1:
            raise InputError(f"max_patches: {self.max_patches} is not at least 1; leave it out for one call")


@dataclass(frozen=True)
class ImageEncoding:
    """What a package makes of images, a row each, in the order given."""

    embeddings: Array  # float32 [I, D]
    logits: Array | None  # float32 [I, C], class scores before softmax or sigmoid; None: there is no classifier
    grids: tuple[tuple[int, int], ...]  # rows and columns of patches
    num_patches: tuple[int, ...]  # fewer than in the grid where some were dropped
    num_calls: int
    timings: Timings


def prepare_images(
    spec: ImageSpec | None, images: Sequence[ImageSource], options: EncodeOptions
) -> tuple[list[Patches], Timings]:
    """Loads and cuts up every image. Raises InputError and CapacityError naming the image."""
    if spec is None:
        raise PackageError("vlmport.json: has no image, so this package sees nothing; export the checkpoint again")
    if isinstance(images, (str, bytes, Path)) or not len(images):
        raise InputError("images: give a list of at least one image")
    rates = _rates(options.token_drop, len(images))
    random = np.random.default_rng(options.seed)
    found: list[Patches] = []
    timings = Timings()
    for number, (source, rate) in enumerate(zip(images, rates, strict=True)):
        is_file = isinstance(source, (str, Path))
        name = source_label(source, "") if is_file else f"images[{number}]"
        started = perf_counter()
        image = load_image(source, name="" if is_file else name)
        decoded = perf_counter()
        patches = preprocess_images([image], spec, options.image, name=name)
        found.append(drop_patches(patches, rate, random) if rate else patches)
        timings = replace(
            timings,
            decode_image=timings.decode_image + decoded - started,
            preprocess=timings.preprocess + perf_counter() - decoded,
        )
    return found, timings


def next_fit(sizes: Sequence[int], limit: int) -> list[range]:
    """Numbers of the images of each call: in order, a new call where the next image has no room (upstream's grouping).

    Raises CapacityError for an image that is over the limit alone.
    """
    groups: list[range] = []
    start, filled = 0, 0
    for number, size in enumerate(sizes):
        if size > limit:
            raise CapacityError(
                f"images[{number}]: {size} patches are over max_patches {limit}; raise it, or lower max_pixels"
            )
        if filled + size > limit:
            groups.append(range(start, number))
            start, filled = number, 0
        filled += size
    return [*groups, range(start, len(sizes))]


def encode_patches(
    patches: Sequence[Patches],
    encode: Callable[[Sequence[Patches]], VisionOutput],
    classify: Callable[[Array], Array] | None,
    max_patches: int | None,
    timings: Timings,
) -> ImageEncoding:
    """Runs the graphs on all images. `encode` gives one row of features an image, `classify` [I, D] -> [I, C].

    `timings` are those so far. Raises CapacityError for an image over `max_patches`, PackageError without pooling.
    """
    sizes = [len(item.pixel_values) for item in patches]
    groups = [range(len(sizes))] if max_patches is None else next_fit(sizes, max_patches)
    outputs = [encode([patches[number] for number in group]) for group in groups]
    for group, output in zip(groups, outputs, strict=True):
        if len(output.features) != len(group):
            raise PackageError(
                f"vlmport.json: {len(output.features)} rows of features for {len(group)} images; this package does not "
                "pool its images, ask it with a prompt"
            )
    embeddings = np.concatenate([output.features for output in outputs])
    pooled = perf_counter()
    logits = None if classify is None else classify(embeddings)
    return ImageEncoding(
        embeddings=embeddings,
        logits=logits,
        grids=tuple((rows, columns) for _, rows, columns in (item.grid for item in patches)),
        num_patches=tuple(sizes),
        num_calls=len(groups),
        timings=replace(
            timings,
            vision=sum(output.timings.vision for output in outputs),
            projector=sum(output.timings.projector for output in outputs) + perf_counter() - pooled,
        ),
    )


def _rates(token_drop: Any, num_images: int) -> list[float]:
    """The rate of each image."""
    if isinstance(token_drop, (int, float)):
        return [float(token_drop)] * num_images
    rates = [float(rate) for rate in token_drop]
    if len(rates) != num_images:
        raise InputError(f"token_drop: {len(rates)} rates for {num_images} images; give one for all, or one each")
    return rates
