"""Projectors that make tokens of several frames at once: which frames each token sees, and how many tokens there are.

Dims: F frames of all images and clips of a call, V images and clips, t frames of one of them.

A still image stands for `num_frames` equal frames. It goes through the graphs as one: whoever takes several frames is
told to take that one again. Index inputs say this, so that images and clips of any lengths go through in one call.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, PackageError
from .manifest import ConnectorSpec, VisionSpec

__all__ = ["frame_shares", "frame_windows", "num_connector_rows", "num_shown_frames"]

Grid = tuple[int, int, int]  # frames, rows, columns; in patches


def num_connector_rows(spec: VisionSpec, grid: Grid) -> int:
    """Tokens of one image or clip. Raises InputError for a clip that is too short to give any."""
    connector = _connector(spec)
    if connector.strategy == "mean":
        return spec.first_rows + grid[1] * grid[2]
    sizes = (num_shown_frames(connector, grid), *grid[1:])
    counts = [_num_windows(connector, size, axis) for axis, size in enumerate(sizes)]
    return counts[0] * counts[1] * counts[2]


def num_shown_frames(connector: ConnectorSpec, grid: Grid) -> int:
    """Frames that an image or clip stands for: an image has one frame, and no clip has (see video.py)."""
    return connector.num_frames if grid[0] == 1 else grid[0]


def frame_windows(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.int64]:
    """The frames that go into each row of tokens in time, int64 [windows, kernel[0]]; F is a frame of zeros."""
    connector = _connector(spec)
    depth, padding, num_frames = connector.kernel[0], connector.padding, sum(t for t, _, _ in grids)
    pieces: list[NDArray[np.int64]] = []
    start = 0
    for grid in grids:
        shown = num_shown_frames(connector, grid)
        frames = start + np.minimum(np.arange(shown), grid[0] - 1)
        edge = np.full(padding, num_frames)
        count = _num_windows(connector, shown, 0)
        pieces.append(np.concatenate([edge, frames, edge])[: count * depth].reshape(count, depth))
        start += grid[0]
    return np.concatenate(pieces)


def frame_shares(spec: VisionSpec, grids: Sequence[Grid]) -> NDArray[np.float32]:
    """What each frame gives to the mean over the frames of its image or clip, float32 [V, F]."""
    _connector(spec)
    counts = [t for t, _, _ in grids]
    shares = np.repeat(np.eye(len(counts), dtype=np.float32), counts, axis=1)
    return shares / np.array(counts, np.float32)[:, None]


def _num_windows(connector: ConnectorSpec, size: int, axis: int) -> int:
    """Places of a kernel that moves by its own length over `size` places with padding at both ends."""
    count = (size + 2 * connector.padding) // connector.kernel[axis]
    if count < 1:
        raise InputError(f"video: {size} frames give no token; this model takes {connector.kernel[axis]} at a time")
    return count


def _connector(spec: VisionSpec) -> ConnectorSpec:
    if spec.connector is None:
        raise PackageError("vlmport.json: vision.connector is missing; export the checkpoint again")
    return spec.connector
