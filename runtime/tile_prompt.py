"""Pictures of several tiles in a prompt: how they are spelled, and where the features of each tile go."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .manifest import PromptSpec, TileTags, TileTokens
from .positions import VisualRun

__all__ = ["Kind", "TilePrompt", "picture_text", "tagged_text", "tile_prompt"]

Kind = Literal["image", "video"]
Grid = tuple[int, int] | None  # columns, rows; None: the whole image alone


class TilePrompt(Protocol):
    """One way to spell pictures."""

    def text(self, grid: Grid, number: int, use_ids: bool | None) -> str:
        """The text of one picture. `number` in the conversation; `use_ids`: with it or not, None: as usual."""
        ...

    def runs(self, input_ids: NDArray[np.int64], kinds: Sequence[Kind]) -> tuple[VisualRun, ...]:
        """Where tiles go in ids [S], one of each kind; features replace what stands there.

        Raises InputError where ids and tiles do not match.
        """
        ...


def tile_prompt(spec: PromptSpec, token_id: Callable[[str], int]) -> TilePrompt | None:
    """The way that a package has; None where its pictures are placeholders. `token_id` raises for an unknown token."""
    if spec.tiles is not None:
        tiles = spec.tiles
        starts = tuple(token_id(token) for token in (tiles.start, tiles.tile_start))
        return _MarkedTiles(tiles, starts, tuple(token_id(token) for token in (tiles.end, tiles.tile_end)))
    return None if spec.tile_tags is None else _TaggedTiles(spec.tile_tags, token_id(spec.tile_tags.filler))


def picture_text(tokens: TileTokens, grid: Grid, number: int | None) -> str:
    """The text of one picture: its number (None: without), the overview, then the (columns, rows) of its tiles."""
    fillers = tokens.filler * tokens.num_fillers
    text = "" if number is None else f"{tokens.id_start}{number}{tokens.id_end}"
    text += tokens.start + fillers + tokens.end
    if grid is None:
        return text
    columns, rows = grid
    row = (tokens.tile_start + fillers + tokens.tile_end) * columns
    return text + "\n".join([row] * rows)


def tagged_text(tags: TileTags, grid: Grid) -> str:
    """The text of one picture: the (columns, rows) of its tiles by number, then the whole image."""
    num_tiles = 0 if grid is None else math.prod(grid)
    names = [*(tags.tile.replace("{number}", str(number + 1)) for number in range(num_tiles)), tags.whole]
    return tags.start + "".join(name + tags.filler * tags.num_fillers for name in names) + tags.end


@dataclass(frozen=True)
class _MarkedTiles:
    """Tiles between tokens."""

    spec: TileTokens
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def text(self, grid: Grid, number: int, use_ids: bool | None) -> str:
        numbered = self.spec.use_ids if use_ids is None else use_ids
        return picture_text(self.spec, grid, number if numbered else None)

    def runs(self, input_ids: NDArray[np.int64], kinds: Sequence[Kind]) -> tuple[VisualRun, ...]:
        length = self.spec.num_fillers
        first = np.flatnonzero(np.isin(input_ids, self.starts)) + 1
        last = np.flatnonzero(np.isin(input_ids, self.ends))
        if len(first) != len(kinds) or len(last) != len(kinds) or (last - first != length).any():
            raise InputError(
                f"input_ids: {len(first)} starts and {len(last)} ends of tiles for {len(kinds)} tiles of {length} "
                "tokens; give each tile its start, its tokens and its end"
            )
        return _runs(first, length, kinds)


@dataclass(frozen=True)
class _TaggedTiles:
    """Tiles behind texts: the fillers alone say where they go."""

    spec: TileTags
    filler: int

    def text(self, grid: Grid, number: int, use_ids: bool | None) -> str:
        del number, use_ids
        return tagged_text(self.spec, grid)

    def runs(self, input_ids: NDArray[np.int64], kinds: Sequence[Kind]) -> tuple[VisualRun, ...]:
        length = self.spec.num_fillers
        places = np.flatnonzero(input_ids == self.filler)
        whole = len(places) == length * len(kinds)
        places = places.reshape(-1, length) if whole else places[:0].reshape(0, length)
        if not whole or (places[:, -1] - places[:, 0] != length - 1).any():
            raise InputError(
                f"input_ids: {int((input_ids == self.filler).sum())} fillers ({self.spec.filler}) for {len(kinds)} "
                f"tiles of {length} tokens; give each tile its own, in one stretch"
            )
        return _runs(places[:, 0], length, kinds)


def _runs(first: NDArray[np.int64], length: int, kinds: Sequence[Kind]) -> tuple[VisualRun, ...]:
    return tuple(VisualRun(kind, int(start), (1, 1, length)) for kind, start in zip(kinds, first, strict=True))
