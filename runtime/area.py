"""Sizes of images that are all scaled to one area, small ones enlarged, with their shape kept (EVEv2)."""

import math

__all__ = ["area_size"]


def area_size(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """Sides in the image's ratio with an area of about `pixels`, each rounded up to a multiple of `factor`.

    The order of operations is that of EVEv2's process_images: where a side is near a multiple, rounding errors decide.
    """
    scale = math.sqrt(width * height) / math.sqrt(pixels)
    new_height, new_width = (max(math.ceil(side / scale / factor) * factor, factor) for side in (height, width))
    return new_height, new_width
