"""Bits by weight: the choices that lose least within a budget of bytes, or take fewest bytes for a loss.

A multiple-choice knapsack, solved by dynamic programming over bytes. Losses of single choices are taken to add up,
which is an approximation: whoever chooses by it measures the choice as a whole afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Choice", "Front", "Item", "Pick"]

_NUM_UNITS = 50_000  # of bytes between the smallest and the largest pick; up to there the result is exact


@dataclass(frozen=True)
class Choice:
    """One way to store a weight: its bits, its bytes, and the loss where it alone is stored so."""

    bits: int
    num_bytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """Weights that share one choice."""

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        assert self.choices, self.name


@dataclass(frozen=True)
class Pick:
    """A choice for every item, in their order; `loss` is the sum of their losses."""

    choices: tuple[Choice, ...]

    @property
    def num_bytes(self) -> int:
        return sum(choice.num_bytes for choice in self.choices)

    @property
    def loss(self) -> float:
        return sum(choice.loss for choice in self.choices)


class Front:
    """The best picks of some items for every budget: none takes no more bytes than another and loses less."""

    def __init__(self, items: Sequence[Item]) -> None:
        """Solves for all budgets at once; time and memory are len(items) times the units of bytes."""
        self._items = tuple(items)
        self._least = [min(choice.num_bytes for choice in item.choices) for item in items]
        span = sum(max(c.num_bytes for c in item.choices) for item in items) - sum(self._least)
        self._unit = max(1, -(-span // _NUM_UNITS))  # rounded up to units, a pick never takes more than it is let
        self._num_units = -(-span // self._unit) + len(items)
        loss = np.zeros(self._num_units + 1)
        self._taken: list[npt.NDArray[np.int8]] = []
        for item, least in zip(items, self._least, strict=True):
            best = np.full_like(loss, np.inf)
            taken = np.zeros(len(loss), np.int8)
            for number, choice in enumerate(item.choices):
                units = self._units(choice, least)
                with_it = np.full_like(loss, np.inf)
                with_it[units:] = loss[: len(loss) - units] + choice.loss
                taken[with_it < best] = number
                np.minimum(best, with_it, out=best)
            loss = best
            self._taken.append(taken)
        self._loss = loss  # the least, by units that may be taken

    def within_bytes(self, num_bytes: int) -> Pick | None:
        """The pick with the least loss of those that take at most so many bytes; None where there is none."""
        spare = num_bytes - sum(self._least)
        return None if spare < 0 else self._pick(min(spare // self._unit, self._num_units))

    def within_loss(self, loss: float) -> Pick:
        """The pick with the fewest bytes of those whose losses add up to at most `loss`; else the least loss."""
        fitting = np.flatnonzero(self._loss <= loss)
        return self._pick(int(fitting[0]) if len(fitting) else int(self._loss.argmin()))

    def points(self, num_points: int) -> list[Pick]:
        """Some picks from the smallest to the one with the least loss, evenly apart in bytes."""
        last = int(self._loss.argmin())
        picks = [self._pick(round(place)) for place in np.linspace(0, last, num_points)]
        return list(dict.fromkeys(picks))

    def _units(self, choice: Choice, least: int) -> int:
        return -(-(choice.num_bytes - least) // self._unit)

    def _pick(self, units: int) -> Pick:
        choices: list[Choice] = []
        for item, least, taken in reversed(list(zip(self._items, self._least, self._taken, strict=True))):
            choice = item.choices[int(taken[units])]
            units -= self._units(choice, least)
            choices.append(choice)
        return Pick(tuple(reversed(choices)))
