"""Rows of golden tensors: which row of a batch, and which tokens of a prompt, a variant can be compared at.

A variant runs prompts alone, without padding. And tokens that upstream's mask hides from all others (PositionSpec) are
left out of its decoder, so that stages with a row a token are compared at the tokens that are seen.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .candidate import Key
from .golden import StageEntry

__all__ = ["at_visible", "is_joint", "joined", "row_of", "token_axis", "unpadded"]

Array = NDArray[Any]
_TOKEN_AXES = {"prefill_logits": 0, "past_key": 1, "past_value": 1}


def token_axis(stage: str) -> int | None:
    """The axis of a stage that has a row for each token the decoder computes; None where there is none."""
    return _TOKEN_AXES.get(stage.split(".")[0])


def at_visible(entry: StageEntry, axis: int, reference: Array, candidate: Array, visible: Array) -> tuple[Array, Array]:
    """Both sides at the visible tokens of the entry's part. `visible` bool [S]; the candidate has no other rows."""
    part = entry.part
    span = slice(None)
    if part is not None and part.axis == axis:
        span = slice(part.start, part.stop)
    elif part is not None:
        candidate = candidate[(slice(None),) * part.axis + (slice(part.start, part.stop),)]
    rows = np.flatnonzero(visible[span])
    place = np.cumsum(visible)[span] - 1
    return reference.take(rows, axis), candidate.take(place[rows], axis)


def unpadded(mask: Array) -> Array:
    """Each row of a mask without its gaps: padding is at the ends, and what is masked between is a token of its own."""
    before, after = (np.logical_or.accumulate(part, axis=1) for part in (mask, mask[:, ::-1]))
    return before & after[:, ::-1]


def is_joint(entry: StageEntry) -> bool:
    """Whether a batch's tensor has no row axis: what upstream computes of the images of all rows at once."""
    axes = re.findall(r"\w+", entry.layout.partition("]")[0])
    return entry.valid is None and "row" not in axes


def joined(rows: Sequence[Mapping[Key, Array]]) -> dict[Key, Array]:
    """Stages of images of several prompts, one after the other: whole ones concatenated, indices counted on."""
    found: dict[Key, list[Array]] = {}
    for row in rows:
        sizes = {key[:2]: sum(other[:2] == key[:2] and other[2] is not None for other in found) for key in row}
        for (stage, modality, index), array in row.items():
            number = None if index is None else index + sizes[stage, modality]
            found.setdefault((stage, modality, number), []).append(array)
    return {
        key: np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        for key, arrays in found.items()
        if len({(array.ndim, array.shape[1:]) for array in arrays}) == 1 and arrays[0].ndim > 0
    }


def row_of(entry: StageEntry, array: Array, row: int, mask: Array) -> Array:
    """The meaningful part of one row of a batch's tensor."""
    if entry.valid is None:
        alone = array[row]
        return alone[mask[row]] if array.shape == mask.shape else alone
    axis = entry.valid.axis - (entry.valid.axis > entry.valid.row_axis)
    span = slice(entry.valid.start[row], entry.valid.stop[row])
    return array.take(row, axis=entry.valid.row_axis)[(slice(None),) * axis + (span,)]
