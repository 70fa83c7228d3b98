"""Images of any shape as squares of a fixed side, for vision encoders that take no other size.

Three ways, by name: "center_crop" (the short side fitted, what is over cut off on both sides), "pad_square" (colour
added on both sides of the short one, then fitted) and "stretch" (fitted, shape not kept). Sizes and offsets are those
of CLIP's image processor and of LLaVA's expand2square, so that pixels are equal to the bit.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import CapacityError
from .manifest import ImageSpec, SquareSpec

__all__ = ["make_square", "pad_to_square"]


def make_square(image: Image.Image, spec: ImageSpec, limit: int, name: str) -> NDArray[np.uint8]:
    """An RGB image as uint8 [side, side, 3].

    Raises CapacityError where sides are so unequal that the image would have over `limit` pixels on the way.
    """
    assert spec.square is not None
    resample = Image.Resampling[spec.resample.upper()]
    if spec.strategy == "stretch":
        return np.asarray(image.resize((spec.square.side, spec.square.side), resample))
    if spec.strategy == "pad_square":
        image = pad_to_square(image, spec.square, limit, name)
    return _cropped(np.asarray(image.resize(_short_side(image, spec.square, limit, name), resample)), spec.square.side)


def pad_to_square(image: Image.Image, square: SquareSpec, limit: int, name: str) -> Image.Image:
    """LLaVA's expand2square: the image in the middle of its longer side's square, the odd pixel at the far end."""
    side = max(image.size)
    _check(side, side, image, limit, name)
    padded = Image.new("RGB", (side, side), square.fill)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def _short_side(image: Image.Image, square: SquareSpec, limit: int, name: str) -> tuple[int, int]:
    """Width and height whose shorter one is `resized`; the longer is rounded down, as transformers does it."""
    short, long = sorted(image.size)
    longer = int(square.resized * long / short)
    _check(square.resized, longer, image, limit, name)
    return (square.resized, longer) if image.width <= image.height else (longer, square.resized)


def _cropped(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def _check(width: int, height: int, image: Image.Image, limit: int, name: str) -> None:
    if width * height > limit:
        raise CapacityError(
            f"{name}: {image.width}x{image.height} has one side {max(image.size) / min(image.size):.0f} times the "
            f"other and would take {width * height} pixels on the way to a square; crop or pad it"
        )
