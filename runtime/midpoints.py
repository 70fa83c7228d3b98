"""Sampling of clips as VideoLLaMA 2 does it: the same number of frames of any clip, each in the middle of its stretch.

A clip that is too short repeats frames. A list of frames is used whole; where it is too short, black frames follow, and
frames over the limit are left out. A stretch of a clip may be asked for in seconds.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .errors import InputError

__all__ = ["fill_list", "midpoint_frames"]


def midpoint_frames(
    total: int, fps: float, num_frames: int, start: float | None, end: float | None, name: str
) -> list[int]:
    """Which `num_frames` of `total` frames at `fps` a second to show, rising.

    `start` and `end` in seconds: negative ones are 0, of two the smaller is the start, and of equal ones the end is a
    second later (upstream's process_video). Halves round to even, after 1e-6 is added. Raises InputError where there is
    no frame.
    """
    if total < 1:
        raise InputError(f"{name}: has no frames; give a video with at least 1")
    if start is not None and end is not None:
        start, end = sorted((max(start, 0.0), max(end, 0.0)))
        end = start + 1 if start == end else end
    first = 0 if start is None else max(int(start * fps) - 1, 0)
    last = total - 1 if end is None else min(int(end * fps) - 1, total - 1)
    count = last - first + 1
    if count < 1:
        asked = f"{start or 0:g} to {total / fps if end is None else end:g}"
        raise InputError(
            f"{name}: has no frame from second {asked}, of {total} frames at {fps:g} a second; change s and e"
        )
    stretch = float(count - 1) / num_frames
    middles = np.array([(stretch * i + stretch * (i + 1)) / 2 for i in range(num_frames)])
    return (first + np.round(middles + 1e-6).astype(int)).tolist()


def fill_list(frames: Sequence[Image.Image], num_frames: int, most: int) -> tuple[Image.Image, ...]:
    """The frames of a list, at least one, with black ones behind it up to `num_frames`, and at most `most`.

    A black frame has the sides of the last frame the wrong way round, as upstream's has.
    """
    missing = num_frames - len(frames)
    black = [Image.new("RGB", (frames[-1].height, frames[-1].width))] * max(missing, 0)
    return (*frames, *black)[:most]
