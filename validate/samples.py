"""Prompts to compare with where no task is given: drawn pictures of several sizes, one text, two pictures, one clip.

Everything is drawn from constants, so that two runs on two boxes ask the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.manifest import Manifest

__all__ = ["Sample", "built_in_samples", "draw_picture"]

_NUM_TOKENS = 16  # a sample's answer


@dataclass(frozen=True)
class Sample:
    """One prompt. `max_new_tokens` bounds the reference's greedy answer; `ignore_eos` makes it exactly that long."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    max_new_tokens: int = _NUM_TOKENS
    ignore_eos: bool = True


def built_in_samples(manifest: Manifest) -> tuple[Sample, ...]:
    """What the package can be asked: text always, pictures and clips where the manifest says how to read them."""
    samples = [_sample("text", [_text("Name three colours and one animal.")])]
    if manifest.image is not None:
        samples += [
            _sample("picture", [_image(1, 112, 84), _text("Describe the picture.")]),
            _sample("wide", [_image(2, 301, 60), _text("What is on the left?")]),
            _sample("tall", [_image(3, 75, 240), _text("What is at the bottom?")]),
            _sample("large", [_image(4, 330, 250), _text("Count the shapes.")]),
            _sample("two pictures", [_image(5, 96, 130), _text("and"), _image(6, 140, 56), _text("What differs?")]),
        ]
    if manifest.image is not None and manifest.video is not None:
        frames = [draw_picture(7 + number, 112, 84) for number in range(4)]
        clip = {"type": "video", "video": frames, "fps": 2.0}
        samples.append(_sample("clip", [clip, _text("What happens?")]))
    return tuple(samples)


def draw_picture(seed: int, width: int, height: int) -> Image.Image:
    """A gradient with noise, rectangles and lines: smooth parts, edges and texture. RGB."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    corners = random.integers(0, 256, (3, 2))
    ramps = [low + (high - low) * (x / width + y / height) / 2 for low, high in corners]
    noise = random.normal(0, 6, (height, width, 3))
    pixels = np.clip(np.stack(ramps, axis=-1) + noise, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        left, top = int(random.integers(0, width)), int(random.integers(0, height))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        pen.rectangle((left, top, left + width // 5, top + height // 5), fill=colour)
        pen.line((left, top, int(random.integers(0, width)), int(random.integers(0, height))), fill=colour, width=2)
    return picture


def _sample(name: str, content: Sequence[Mapping[str, Any]]) -> Sample:
    return Sample(name, ({"role": "user", "content": list(content)},))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(seed: int, width: int, height: int) -> dict[str, Any]:
    return {"type": "image", "image": draw_picture(seed, width, height)}
