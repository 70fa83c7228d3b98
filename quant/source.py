"""Where the float values of parameters come from."""

from collections.abc import Hashable
from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["WeightSource"]


class WeightSource(Protocol):
    """Where the float values of parameters come from."""

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        ...

    def origin(self, parameter: str) -> Hashable:
        """Equal for two parameters, of any graphs, that are one tensor of the checkpoint."""
        ...

    def rows(self, parameter: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Slices [start, stop) of axis 0: float32 [stop - start, ...], or uint8 of what the graph has as uint8."""
        ...
