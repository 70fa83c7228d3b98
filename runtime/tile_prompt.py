"""Pictures of several tiles in a prompt: how they are spelled, and where the features of each tile go."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .manifest import TileTokens
from .positions import VisualRun

__all__ = ["Kind", "picture_text", "tile_runs"]

Kind = Literal["image", "video"]


def picture_text(tokens: TileTokens, grid: tuple[int, int] | None, number: int | None) -> str:
    """The text of one picture: its number (None: without), the overview, then the (columns, rows) of its tiles."""
    fillers = tokens.filler * tokens.num_fillers
    text = "" if number is None else f"{tokens.id_start}{number}{tokens.id_end}"
    text += tokens.start + fillers + tokens.end
    if grid is None:
        return text
    columns, rows = grid
    row = (tokens.tile_start + fillers + tokens.tile_end) * columns
    return text + "\n".join([row] * rows)


def tile_runs(
    input_ids: NDArray[np.int64], starts: Sequence[int], ends: Sequence[int], length: int, kinds: Sequence[Kind]
) -> tuple[VisualRun, ...]:
    """Where tiles go in ids [S]: `length` ids between one of the ids `starts` and one of `ends`, a tile of each kind.

    What stands there is of no matter, for features replace it. Raises InputError where ids and tiles do not match.
    """
    first = np.flatnonzero(np.isin(input_ids, starts)) + 1
    last = np.flatnonzero(np.isin(input_ids, ends))
    if len(first) != len(kinds) or len(last) != len(kinds) or (last - first != length).any():
        raise InputError(
            f"input_ids: {len(first)} starts and {len(last)} ends of tiles for {len(kinds)} tiles of {length} tokens; "
            "give each tile its start, its tokens and its end"
        )
    return tuple(VisualRun(kind, int(start), (1, 1, length)) for kind, start in zip(kinds, first, strict=True))
