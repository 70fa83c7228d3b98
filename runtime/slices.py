"""Large images in slices (LLaVA-UHD, arXiv 2403.11703): an overview, and where there are many pixels a grid of tiles.

All sizes are (width, height) in pixels, as upstream has them, and every rounding is Python's (halves to even). Each
tile is a segment of its own for the vision encoder, and takes the same number of tokens whatever its size.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .errors import CapacityError, InputError
from .image import MAX_SOURCE_PIXELS, RESAMPLE, ImageOptions, Patches, patchify
from .manifest import ImageSpec

__all__ = ["MAX_TILE_PATCHES", "Picture", "Pictures", "Slicing", "cut_picture", "plan_slices"]

MAX_TILE_PATCHES = 16_384  # all that a ratio of sides up to scale_resolution^2 needs; beyond, upstream's sizes run away

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Slicing:
    """What an image becomes. `grid` is (columns, rows) of the tiles and `refined` the size that is cut into them."""

    overview: Size
    grid: tuple[int, int] | None = None
    refined: Size | None = None

    @property
    def tile(self) -> Size | None:
        """Width and height of each tile of the grid."""
        if self.grid is None or self.refined is None:
            return None
        return self.refined[0] // self.grid[0], self.refined[1] // self.grid[1]


@dataclass(frozen=True)
class Picture:
    """An image or a frame as the model takes it: the tiles row by row, left to right, and the whole image.

    The whole image comes first (runtime/slices.py) or last (runtime/ratio_tiles.py), as it does in the prompt.
    """

    tiles: tuple[Patches, ...]
    grid: tuple[int, int] | None  # columns, rows; None: the whole image alone


@dataclass(frozen=True)
class Pictures:
    """What a part of a message shows: one picture, or one a frame."""

    pictures: tuple[Picture, ...]
    use_ids: bool | None = None  # whether the prompt has their numbers; None: as the package says

    @property
    def tiles(self) -> tuple[Patches, ...]:
        """All tiles, in the order of the prompt."""
        return tuple(tile for picture in self.pictures for tile in picture.tiles)


def plan_slices(width: int, height: int, scale: int, patch: int, max_slices: int) -> Slicing:
    """How an image of any size is cut. `scale` is the side of a square with as many pixels as a tile should have."""
    grid = _grid(width, height, scale, max_slices)
    if grid is None:
        return Slicing(_best_resize(width, height, scale, patch, enlarge=True))
    columns, rows = grid
    tile = _best_resize(
        _nearest_multiple(width, columns) / columns, _nearest_multiple(height, rows) / rows, scale, patch, enlarge=True
    )
    return Slicing(_best_resize(width, height, scale, patch, enlarge=False), grid, (tile[0] * columns, tile[1] * rows))


def cut_picture(
    image: Image.Image, spec: ImageSpec, options: ImageOptions | None = None, *, name: str = "image"
) -> Picture:
    """An RGB image resized and cut into patches.

    Raises InputError for sides so unequal that no tile can hold them, CapacityError over MAX_SOURCE_PIXELS.
    """
    assert spec.slices is not None
    options = options or ImageOptions()
    options.refuse(name, "min_pixels", "max_pixels", "aspect_ratio", known="max_slice_nums and use_image_id")
    max_slices = spec.slices.max_slices if options.max_slice_nums is None else options.max_slice_nums
    if max_slices < 1:
        raise InputError(f"{name}: max_slice_nums is {max_slices}; give 1 for no tiles, or more")
    if not spec.slices.enabled:
        return Picture((_whole_patches(image, spec, name),), None)
    plan = plan_slices(*image.size, spec.slices.scale_resolution, spec.patch_size, max_slices)
    _check(plan, spec, name, image.size)
    resample = RESAMPLE[spec.resample]
    tiles = [image.resize(plan.overview, resample)]
    if plan.grid is not None and plan.refined is not None and plan.tile is not None:
        refined, (width, height) = image.resize(plan.refined, resample), plan.tile
        tiles += [
            refined.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            for y in range(plan.grid[1])
            for x in range(plan.grid[0])
        ]
    return Picture(tuple(patchify([np.asarray(tile)], spec) for tile in tiles), plan.grid)


def _check(plan: Slicing, spec: ImageSpec, name: str, size: Size) -> None:
    for width, height in (plan.overview, plan.tile or plan.overview):
        if (width // spec.patch_size) * (height // spec.patch_size) > MAX_TILE_PATCHES:
            raise InputError(
                f"{name}: {size[0]}x{size[1]} has one side {max(size) / min(size):.0f} times the other, which would "
                f"make a tile of {width}x{height}; crop or pad it"
            )
    area = math.prod(plan.refined or plan.overview)
    if area > MAX_SOURCE_PIXELS:
        raise CapacityError(
            f"{name}: its tiles are {area} pixels, over the limit of {MAX_SOURCE_PIXELS}; lower max_slice_nums"
        )


def _whole_patches(image: Image.Image, spec: ImageSpec, name: str) -> Patches:
    """The image at its own size; what is left of a patch at the right and bottom is cut off, as upstream does it."""
    width, height = (side // spec.patch_size * spec.patch_size for side in image.size)
    if not width or not height:
        raise InputError(
            f"{name}: {image.width}x{image.height} is less than one patch of {spec.patch_size} pixels; enlarge it"
        )
    return patchify([np.asarray(image.crop((0, 0, width, height)))], spec)


def _grid(width: int, height: int, scale: int, max_slices: int) -> tuple[int, int] | None:
    """Columns and rows of about as many tiles as the image has times `scale` squared, in the shape nearest to its."""
    multiple = min(math.ceil(width * height / (scale * scale)), max_slices)
    if multiple <= 1:
        return None
    ratio = math.log(width / height)
    best, least = (1, 1), math.inf
    for count in (multiple - 1, multiple, multiple + 1):
        if count == 1 or count > max_slices:
            continue
        for columns in range(1, count + 1):
            error = abs(ratio - math.log(columns / (count // columns)))
            if count % columns == 0 and error < least:
                best, least = (columns, count // columns), error
    return best


def _best_resize(width: float, height: float, scale: int, patch: int, *, enlarge: bool) -> Size:
    """The size in whole patches; images of more pixels than `scale` squared, or any with `enlarge`, get as many."""
    if width * height > scale * scale or enlarge:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)  # of the truncated height
    return _nearest_multiple(width, patch), _nearest_multiple(height, patch)


def _nearest_multiple(length: float, step: int) -> int:
    return max(round(length / step) * step, step)
