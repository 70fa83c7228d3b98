"""Images in squares (InternVL 1.5, arXiv 2404.16821): the grid whose shape is nearest, and the whole image behind it.

The image is stretched over the grid and cut up; where the grid is one tile, that is the whole image. Every tile has the
same number of pixels. Sizes are (width, height).
"""

import math

import numpy as np
from PIL import Image

from .errors import InputError
from .image import RESAMPLE, ImageOptions, patchify
from .manifest import ImageSpec
from .slices import Picture

__all__ = ["cut_tiles", "nearest_grid"]


def nearest_grid(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows of `fewest` to `most` tiles in the shape nearest to the image's.

    Of grids that are equally near, a larger one is taken where the image has over half of its pixels.
    """
    grids = [(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if fewest <= x * y <= most]
    best, least = (1, 1), math.inf
    for columns, rows in sorted(grids, key=math.prod):
        error = abs(width / height - columns / rows)
        if error < least:
            best, least = (columns, rows), error
        elif error == least and width * height > 0.5 * side * side * columns * rows:
            best = (columns, rows)
    return best


def cut_tiles(
    image: Image.Image, spec: ImageSpec, options: ImageOptions | None = None, *, name: str = "image"
) -> Picture:
    """An RGB image resized and cut into patches. Raises InputError for options that the package cannot obey."""
    assert spec.ratio_tiles is not None
    tiles, options = spec.ratio_tiles, options or ImageOptions()
    options.refuse(name, "min_pixels", "max_pixels", "aspect_ratio", "use_image_id", known="max_slice_nums")
    most = tiles.max_tiles if options.max_slice_nums is None else options.max_slice_nums
    if most < tiles.min_tiles:
        raise InputError(f"{name}: max_slice_nums is {most}; give {tiles.min_tiles} or more")
    side, resample = tiles.side, RESAMPLE[spec.resample]
    columns, rows = nearest_grid(*image.size, side, tiles.min_tiles, most)
    resized = image.resize((side * columns, side * rows), resample)
    squares = [
        resized.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(columns)
    ]
    if len(squares) == 1:
        return Picture((patchify([np.asarray(resized)], spec),), None)
    squares.append(image.resize((side, side), resample))
    return Picture(tuple(patchify([np.asarray(square)], spec) for square in squares), (columns, rows))
