"""Positions of tokens: one row for plain rotary positions, three rows (time, height, width) where images take part.

Dims: S tokens of the prompt, t h w the grid of an image or clip in tokens (merge blocks).

The rule for clips changed twice in transformers, and checkpoints are compared with one of the three, so all are here by
name. 4.49, the first: time counts tokens_per_second, and text goes on after the largest position so far. 4.57 cuts the
seconds from one grid row to the next down to an integer first. 5.23 does not, but text goes on after the larger side of
the grid, whatever its length in time. Images and short clips are the same in all three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import PackageError
from .manifest import PositionSpec

__all__ = ["VIDEO_RULES", "Positions", "VisualRun", "positions"]

VIDEO_RULES = ("transformers-4.49", "transformers-4.57", "transformers-5.23")


@dataclass(frozen=True)
class VisualRun:
    """The tokens of a prompt that one image or clip takes: `length` of them from index `start` on."""

    kind: Literal["image", "video"]
    start: int
    grid: tuple[int, int, int]  # t, h, w in tokens; raster order
    seconds_per_grid: float | None = None  # of a clip: time from one grid row of frames to the next; None: 1 s
    num_tokens: int | None = None  # where it takes other than one a place of the grid

    @property
    def length(self) -> int:
        return math.prod(self.grid) if self.num_tokens is None else self.num_tokens


@dataclass(frozen=True)
class Positions:
    """Positions of a prompt, and the way on: token number n of the sequence (from 0) has position n + rope_delta."""

    position_ids: NDArray[np.int64]  # [3, S] for "mrope", [S] for "sequential"
    rope_delta: int


def positions(spec: PositionSpec, num_tokens: int, runs: Sequence[VisualRun]) -> Positions:
    """Positions of `num_tokens` tokens, of which `runs` are images and clips in order of their tokens.

    Raises PackageError for a strategy or video rule that this version does not know.
    """
    if spec.strategy == "sequential":
        return Positions(np.arange(num_tokens, dtype=np.int64), 0)
    if spec.strategy != "mrope":
        raise PackageError(f"vlmport.json: positions.strategy {spec.strategy!r} is neither sequential nor mrope")
    if spec.video_rule not in VIDEO_RULES:
        raise PackageError(
            f"vlmport.json: positions.video_rule {spec.video_rule!r} is not one of {', '.join(VIDEO_RULES)}"
        )
    return _mrope(spec, num_tokens, runs)


def _mrope(spec: PositionSpec, num_tokens: int, runs: Sequence[VisualRun]) -> Positions:
    """get_rope_index of transformers' qwen2_5_vl, a run at a time. Text: the same number on all three rows."""
    place = np.empty((3, num_tokens), np.int64)
    done, current = 0, 0  # tokens placed; position of the next one
    for run in runs:
        assert done <= run.start <= num_tokens - run.length, "runs are in order and inside the prompt"
        text = run.start - done
        place[:, done : run.start] = current + np.arange(text)
        current += text
        t, h, w = run.grid
        block = place[:, run.start : run.start + run.length].reshape(3, t, h, w)
        block[0] = current + _times(spec, run)[:, None, None]
        block[1] = current + np.arange(h)[:, None]
        block[2] = current + np.arange(w)
        current = current + max(h, w) if spec.video_rule == "transformers-5.23" else int(block.max()) + 1
        done = run.start + run.length
    place[:, done:] = current + np.arange(num_tokens - done)
    return Positions(place, int(place.max(initial=-1)) + 1 - num_tokens)


def _times(spec: PositionSpec, run: VisualRun) -> NDArray[np.int64]:
    """Position of each grid row of frames relative to the first, int64 [t].

    In float32 and in the reference's order of products, because the result is cut to an integer: a product that ends
    just under one would otherwise fall to the one below.
    """
    steps = np.arange(run.grid[0], dtype=np.int64)
    if run.kind == "image":
        return np.zeros_like(steps)
    if spec.tokens_per_second is None:
        return steps
    seconds = np.float32(1 if run.seconds_per_grid is None else run.seconds_per_grid)
    rate = np.float32(spec.tokens_per_second)
    if spec.video_rule == "transformers-4.57":
        return (steps * int(seconds) * spec.tokens_per_second).astype(np.int64)
    counts = steps.astype(np.float32)
    times = counts * (seconds * rate) if spec.video_rule == "transformers-5.23" else counts * seconds * rate
    return times.astype(np.int64)
