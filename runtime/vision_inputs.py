"""Index inputs of the vision encoder, made from the grids of all images and clips of one call.

Dims: P patches of all entries, B = P / m^2 merge blocks, F frames (grid rows in time) of all entries, m merge side.
Patches lie entry by entry, frame by frame, merge blocks in raster order, the m*m patches of a block together.

A manifest names the inputs that its graph takes; each name is a function here. Attention never leaves a frame, so any
number of entries of any size go through the encoder in one call.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .connector import frame_shares, frame_windows, num_connector_rows
from .errors import PackageError
from .manifest import VisionSpec

__all__ = [
    "Grid",
    "bucketed_positions",
    "cu_seqlens",
    "cu_window_seqlens",
    "image_rows",
    "num_rows",
    "patch_fractions",
    "patch_fractions_by_longest",
    "patch_positions",
    "vision_inputs",
    "window_index",
]

Grid = tuple[int, int, int]  # frames, rows, columns; in patches


def vision_inputs(
    spec: VisionSpec, grids: Sequence[Grid], names: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The named inputs, by default those of the vision encoder. Raises PackageError for a name that is not known."""
    known = {
        "bucketed_positions": bucketed_positions,
        "patch_positions": patch_positions,
        "patch_fractions": patch_fractions,
        "patch_fractions_by_longest": patch_fractions_by_longest,
        "cu_seqlens": cu_seqlens,
        "image_rows": image_rows,
        "window_index": window_index,
        "cu_window_seqlens": cu_window_seqlens,
        "frame_windows": frame_windows,
        "frame_shares": frame_shares,
    }
    names = spec.inputs if names is None else names
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise PackageError(f"vlmport.json: vision.inputs: {unknown[0]!r} is not one of {', '.join(known)}")
    return {name: known[name](spec, grids) for name in names}


def num_rows(spec: VisionSpec, grid: Grid) -> int:
    """Rows that replace placeholders of one image or clip, and so its tokens in a prompt."""
    if spec.connector is not None:
        return num_connector_rows(spec, grid)
    t, h, w = grid
    merge = spec.merge_size
    return t * (spec.first_rows + h // merge * (w // merge + spec.row_ends))


def image_rows(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int64]:
    """What each row of each image is, int64 [rows]: 0 in front of it, 1 at the end of a row, 2 + n the n-th block."""
    pieces: list[NDArray[np.int64]] = []
    done = 0
    for t, h, w in grids:
        frame = (h // spec.merge_size, w // spec.merge_size)
        blocks = done + np.arange(t * frame[0] * frame[1]).reshape(t, *frame)
        ended = np.concatenate([2 + blocks, np.ones((t, frame[0], spec.row_ends), np.int64)], axis=2)
        begun = np.concatenate([np.zeros((t, spec.first_rows), np.int64), ended.reshape(t, -1)], axis=1)
        pieces.append(begun.reshape(-1))
        done += blocks.size
    return np.concatenate(pieces)


def patch_positions(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int64]:
    """Row and column of every patch in its frame, int64 [P, 2]."""
    return np.concatenate([np.tile(_frame_positions(h, w, spec.merge_size), (t, 1)) for t, h, w in grids])


def bucketed_positions(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int64]:
    """Rows of a table of position_side^2 learned positions, int64 [P], rasters of the frames one after the other.

    Each axis is cut into `position_side` equal buckets, and a patch has the bucket in which it starts. Which that is
    hangs on the last bit at several sizes, so the reference's float32 arithmetic is followed to the bit.
    """
    side = spec.position_side
    if side < 1 or spec.merge_size != 1:
        raise PackageError(f"vlmport.json: vision.position_side {side} or merge_size is wrong for bucketed_positions")
    ids = [np.tile((_buckets(h, side)[:, None] * side + _buckets(w, side)).reshape(-1), t) for t, h, w in grids]
    return np.concatenate(ids)


def _buckets(count: int, side: int) -> NDArray[np.int64]:
    """Bucket of each of `count` patches on an axis of `side` buckets, int64 [count].

    torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / count), torch.arange(1 / side, 1, 1 / side), right=True).
    """
    starts = _vectorised_arange(float(np.float32(1) / np.float32(count)), count)
    step = 1 / side
    edges = (step + np.arange(math.ceil((1 - step) / step)) * step).astype(np.float32)
    return np.searchsorted(edges, starts, side="right")


def _vectorised_arange(step: float, count: int) -> NDArray[np.float32]:
    """torch.arange(0, ..., step) in float32: eight at a time from a rounded base, the rest one by one."""
    index = np.arange(count)
    base = (step * (index // 8 * 8)).astype(np.float32).astype(np.float64)
    values = (base + (index % 8) * step).astype(np.float32)
    single = count // 8 * 8
    values[single:] = (step * index[single:]).astype(np.float32)
    return values


def patch_fractions(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.float32]:
    """The same as shares of the frame's own rows and columns, float32 [P, 2] in [0, 1) (NaViT, section 3.2)."""
    return _fractions(spec, grids, [(h, w) for _, h, w in grids])


def patch_fractions_by_longest(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.float32]:
    """The same as shares of the longer side, which keeps the shape of the frame."""
    return _fractions(spec, grids, [(max(h, w), max(h, w)) for _, h, w in grids])


def _fractions(spec: VisionSpec, grids: Sequence[Grid], sides: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    parts = [patch_positions(spec, [grid]) / np.array(side) for grid, side in zip(grids, sides, strict=True)]
    return np.concatenate(parts).astype(np.float32)


def cu_seqlens(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int32]:
    """Where frames begin and the last one ends, in patches, int32 [F + 1]."""
    del spec  # every name takes the same arguments
    return _cumulated(np.concatenate([np.full(t, h * w) for t, h, w in grids]))


def window_index(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int64]:
    """Merge blocks in the order of attention windows, int64 [B]: windows in raster order in each frame, blocks within.

    Windows are `window_blocks` wide and high and are cut off at the right and bottom.
    """
    pieces: list[NDArray[np.int64]] = []
    start = 0
    for t, h, w in grids:
        rows, columns = h // spec.merge_size, w // spec.merge_size
        order = np.argsort(_window_numbers(spec, rows, columns), kind="stable")  # stable: raster order within a window
        frames = start + np.arange(t)[:, None] * rows * columns
        pieces.append((frames + order).reshape(-1))
        start += t * rows * columns
    return np.concatenate(pieces)


def cu_window_seqlens(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int32]:
    """Where windows begin and the last one ends, in patches in window order, int32 [windows + 1]; none is empty."""
    sizes: list[NDArray[np.int64]] = []
    for t, h, w in grids:
        blocks = np.bincount(_window_numbers(spec, h // spec.merge_size, w // spec.merge_size))
        sizes.append(np.tile(blocks * spec.merge_size**2, t))
    return _cumulated(np.concatenate(sizes))


def _window_numbers(spec: VisionSpec, rows: int, columns: int) -> NDArray[np.int64]:
    """Number of the window that each merge block of a frame is in, int64 [rows * columns]."""
    side = spec.window_blocks
    if side < 1:
        raise PackageError(f"vlmport.json: vision.window_blocks is {side}, but vision.inputs names windows")
    across = -(-columns // side)
    return (np.arange(rows)[:, None] // side * across + np.arange(columns) // side).reshape(-1)


def _frame_positions(height: int, width: int, merge: int) -> NDArray[np.int64]:
    """Row and column of the patches of one frame, int64 [height * width, 2]."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = np.stack([rows, columns], axis=-1).reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def _cumulated(sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
