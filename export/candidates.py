"""How each weight of a package may be stored in 4, 8 or more bits: codes and factors, found once, to choose from.

Factors moved along folds (quant/balance.py, and AWQ's) leave the function as it is, so they stay whatever is chosen. A
calibrated method runs once, with 4 bits everywhere; its codes are taken where 4 bits are, 8 are rounded to nearest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from ..quant.balance import balance
from ..quant.data_file import Progress
from ..quant.found import Factors, FoundCodes, FoundRole
from ..quant.recipe import CALIBRATED_METHODS, MIXED_NAME, Recipe, Rule, Target, WeightFormat
from ..quant.source import WeightSource
from ..runtime.manifest import Calibration
from .calibrate import Calibrator, OpenRole
from .weight_groups import Key

__all__ = ["Candidates", "ChosenCodes", "find_candidates"]

_NARROW = 4


@dataclass(frozen=True)
class Candidates:
    """Formats by weight and bits."""

    method: str
    block_size: int
    open_role: OpenRole  # float graphs and weights, with the factors in them
    without_method: frozenset[Key]
    found: Mapping[str, FoundRole] = field(default_factory=dict[str, FoundRole])  # by role, where data were needed

    def format_of(self, key: Key, bits: int) -> WeightFormat:
        """The format of a weight with so many bits."""
        if bits >= 16:
            return WeightFormat(bits)
        has_method = key not in self.without_method
        if self.method in CALIBRATED_METHODS:
            has_method = bits == _NARROW and self.codes_of(key) is not None
        return WeightFormat(bits, self.block_size, method=self.method if has_method else "rtn")

    def codes_of(self, key: Key) -> FoundCodes | None:
        """Codes of a weight in 4 bits; None where they follow from its values."""
        role, name = key
        return self.found[role].codes.get(name) if role in self.found else None


@dataclass
class ChosenCodes:
    """Codes of 4 bits, as what calibration gives to the writer of a variant."""

    record: Calibration
    found: Mapping[str, FoundRole]

    def calibrate(self, recipe: Recipe, target: Target, open_role: OpenRole, folder: Path) -> dict[str, FoundRole]:
        """The codes of the weights that the recipe has calibrated; the writer is given weights with factors in them."""
        del open_role
        roles: dict[str, FoundRole] = {}
        for role, found in self.found.items():
            formats = {name: recipe.format_of(role, name, target) for name in found.codes}
            codes = {name: each for name, each in found.codes.items() if formats[name] == each.format}
            roles[role] = FoundRole(folder, codes)
        return roles


def find_candidates(
    calibrator: Calibrator,
    target: Target,
    open_role: OpenRole,
    folder: Path,
    without_method: frozenset[Key],
    *,
    method: str,
    block_size: int,
    progress: Progress | None = None,
) -> Candidates:
    """Finds them; files of codes, 0.7 bytes a weight, go below `folder`.

    `without_method` are weights that are tables too: stored once, by codes that follow from their values.
    """
    plain = WeightFormat(_NARROW, block_size)

    def uniform(format: WeightFormat) -> Recipe:
        kept = (Rule("/".join(key), plain) for key in sorted(without_method))
        return Recipe(MIXED_NAME, (*kept, Rule("*/*.weight", format)))

    factors: dict[str, Factors] = {}

    def balanced(role: str) -> tuple[ir.Model, WeightSource]:
        model, source = open_role(role)
        if role not in factors:
            if progress is not None:
                progress(0, 0, f"{MIXED_NAME}: balancing {role}")
            factors[role] = balance(model.graph, role, uniform(replace(plain, balance=True)), target, source)
        return model, factors[role].apply(model, source)

    if method not in CALIBRATED_METHODS:
        return Candidates(method, block_size, balanced, without_method)
    found = calibrator.calibrate(uniform(replace(plain, method=method)), target, balanced, folder)

    def with_factors(role: str) -> tuple[ir.Model, WeightSource]:
        model, source = balanced(role)
        return model, found[role].apply(model, source) if role in found else source

    return Candidates(method, block_size, with_factors, without_method, found)
