"""Token dropping (NaViT, arXiv 2307.06304, section 3.3): an image without some of its patches, which keep their places.

The paper drops patches in training, to see more images for the same work. Here it is off unless a request asks for it:
to trade accuracy for speed, or to repeat what a training run computed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .image import Patches
from .vision_inputs import Grid

__all__ = ["drop_patches", "keep_patches", "kept_inputs"]


def drop_patches(patches: Patches, rate: float, random: np.random.Generator) -> Patches:
    """The image without a random share `rate` of its patches, at least one of them left, in random order.

    As many stay as upstream keeps, max(1, int(n * (1 - rate))), drawn alike: those with the largest of n normals.
    Raises InputError for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise InputError(f"token_drop: {rate} is not at least 0 and below 1")
    num_patches = len(patches.pixel_values)
    num_kept = max(1, int(num_patches * (1 - rate)))
    return keep_patches(patches, np.argsort(-random.standard_normal(num_patches))[:num_kept])


def keep_patches(patches: Patches, indices: Sequence[int] | NDArray[np.int64], name: str = "image") -> Patches:
    """The image with the patches at these row-major indices alone, in this order.

    Raises InputError unless there is one at least, and each is a patch of the image and named once.
    """
    kept = np.asarray(indices, np.int64)
    if kept.ndim != 1 or not kept.size:
        raise InputError(f"{name}: keep_indices has shape {list(kept.shape)}; give a list of at least one patch")
    if kept.min() < 0 or kept.max() >= patches.num_patches or len(np.unique(kept)) < len(kept):
        raise InputError(f"{name}: keep_indices names a patch twice, or one that is not among {patches.num_patches}")
    return replace(patches, pixel_values=patches.pixel_values[kept], kept=kept)


def kept_inputs(
    inputs: Mapping[str, NDArray[Any]], grids: Sequence[Grid], kept: Sequence[NDArray[np.int64] | None]
) -> dict[str, NDArray[Any]]:
    """Index inputs of whole images -> those of what is left: rows of the ones with a row a patch, and new bounds.

    `kept` has an entry an image, None where it has every patch. Raises InputError for inputs that need all patches.
    """
    if all(indices is None for indices in kept):
        return dict(inputs)
    sizes = [math.prod(grid) for grid in grids]
    starts = np.cumsum([0, *sizes[:-1]])
    indices = [np.arange(size) if own is None else own for size, own in zip(sizes, kept, strict=True)]
    rows = np.concatenate([start + own for start, own in zip(starts, indices, strict=True)])
    found: dict[str, NDArray[Any]] = {}
    for name, array in inputs.items():
        if name == "cu_seqlens" and all(num_frames == 1 for num_frames, _, _ in grids):
            found[name] = np.cumsum([0, *map(len, indices)]).astype(array.dtype)
        elif name in _ROW_A_PATCH:
            found[name] = array[rows]
        else:
            raise InputError(f"token_drop: {name} of this package needs every patch; leave token_drop out")
    return found


_ROW_A_PATCH = ("patch_positions", "patch_fractions", "patch_fractions_by_longest", "bucketed_positions")
