"""Index inputs of a decoder that has weights of its own for visual tokens: which rows go through which.

Dims: S tokens of a call, T text tokens, V visual tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROUTING_INPUTS", "TEXT_STEP", "routing_inputs"]

ROUTING_INPUTS = ("text_rows", "visual_rows", "row_places")


def routing_inputs(visual_S: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """text_rows int64 [T] and visual_rows int64 [V] among the tokens, row_places int64 [1, S] among T + V rows."""
    text, visual = np.flatnonzero(~visual_S), np.flatnonzero(visual_S)
    places = np.argsort(np.concatenate([text, visual]))
    return dict(zip(ROUTING_INPUTS, (text, visual, places[None]), strict=True))


TEXT_STEP = routing_inputs(np.zeros(1, bool))  # of a single text token, as every generated one is
