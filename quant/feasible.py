"""What a recipe asks for that cannot be done, told before any work begins."""

from collections.abc import Sequence
from pathlib import Path

from ..runtime.errors import RecipeError
from .recipe import CALIBRATED_METHODS, Recipe, Target

__all__ = ["check_calibration", "check_method"]


def check_calibration(recipes: Sequence[Recipe], target: Target, folder: Path | None) -> None:
    """Raises RecipeError where there are data and nothing looks at them, or the other way round.

    Nor does a target have a cache in codes that has no kernel for it.
    """
    for recipe in recipes:
        if recipe.cache is not None and target != "cpu":
            raise RecipeError(
                f"recipe {recipe.name}: a cache of {recipe.cache.bits} bits is for target cpu; leave it out"
            )
    needing = [recipe.name for recipe in recipes if recipe.is_calibrated(target=target)]
    if needing and folder is None:
        raise RecipeError(f"recipe {needing[0]}: its method or cache looks at activations; give --calibration DIR")
    if folder is not None and not needing:
        names = ", ".join(recipe.name for recipe in recipes)
        is_half = any(rule.format.bits == 16 for recipe in recipes for rule in recipe.rules)
        why = " (the cpu target computes in float32, where no value is too large)" if is_half else ""
        raise RecipeError(
            f"--calibration {folder}: no method of {names} looks at data{why}; leave it out, "
            f"or give --method {', '.join(CALIBRATED_METHODS)}"
        )


def check_method(recipes: Sequence[Recipe], method: str | None) -> None:
    """Raises RecipeError where a method was asked for and no recipe has codes that it finds."""
    if method in (None, "rtn") or any(rule.format.method == method for recipe in recipes for rule in recipe.rules):
        return
    names = ", ".join(recipe.name for recipe in recipes)
    raise RecipeError(f"--method {method}: {names} has no codes that a method finds; leave it out, or use int8 or int4")
