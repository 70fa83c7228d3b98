"""The budget of the recipe int4-mixed, and the table that shows what other budgets would give."""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.recipe import MIXED_NAME
from ..runtime.errors import InputError, RecipeError
from ..runtime.package import Package
from .progress import Progress
from .table import table

if TYPE_CHECKING:
    from ..export.calibrate import Calibrator, OpenRole
    from ..export.mixed import Budget, Mixed

__all__ = ["add_budget", "budget_of", "choose", "print_choice"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB)?", re.IGNORECASE)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def add_budget(parser: argparse.ArgumentParser) -> None:
    """--max-size, --max-kl."""
    parser.add_argument(
        "--max-size", metavar="SIZE", help=f"of the files of {MIXED_NAME}: 1.5GB, 800MB, or a number of bytes"
    )
    parser.add_argument(
        "--max-kl", metavar="KL", type=float, help=f"that {MIXED_NAME} may have on answers, a mean in nats: 0.01"
    )


def budget_of(args: argparse.Namespace) -> "Budget | None":
    """The budget of int4-mixed, or None with any other recipe. Raises InputError where options do not go together."""
    if args.recipe != MIXED_NAME:
        for name in ("max_size", "max_kl"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: goes with --recipe {MIXED_NAME}")
        return None
    if args.calibration is None:
        raise RecipeError(f"recipe {MIXED_NAME}: bits are chosen by what answers lose; give --calibration DIR")
    if args.method is not None:
        raise RecipeError(f"recipe {MIXED_NAME}: --method {args.method}: it measures rounding to nearest; leave it out")
    if args.kv_cache is not None:
        raise RecipeError(f"recipe {MIXED_NAME}: --kv-cache {args.kv_cache}: weights alone are measured; leave it out")
    from ..export.mixed import Budget  # torch is needed from here on

    return Budget(None if args.max_size is None else _num_bytes(args.max_size), args.max_kl)


def choose(
    package: Package,
    budget: "Budget",
    calibrator: "Calibrator | None",
    open_role: "OpenRole",
    block_size: int | None,
    progress: Progress,
) -> "Mixed":
    """Measures and chooses. Raises RecipeError where the package has such a variant already."""
    from ..export.float_roles import FloatRoles
    from ..export.mixed import choose_bits

    assert calibrator is not None
    if MIXED_NAME in package.manifest.variants:
        raise RecipeError(f"{package.path}: has a variant {MIXED_NAME}; make another one in a copy of the package")
    target = package.manifest.target
    with tempfile.TemporaryDirectory(prefix="vlmport-") as folder:
        roles = FloatRoles(calibrator.feeds, calibrator.roles, open_role, target, Path(folder))
        return choose_bits(roles, target, budget, block_size=block_size or 32, progress=progress)


def print_choice(chosen: "Mixed") -> None:
    """The best choice of each size, and what was measured of the one that was made."""
    picks = sorted({*chosen.points, chosen.chosen}, key=lambda pick: pick.num_bytes)
    rows = [
        (
            "chosen" if pick == chosen.chosen else "",
            f"{(pick.num_bytes + chosen.fixed_bytes) / 1e6:.3f} MB",
            f"{pick.loss:.2e}",
            *(str(sum(choice.bits in bits for choice in pick.choices)) for bits in ((4,), (8,), (16, 32))),
        )
        for pick in picks
    ]
    print(table(("", "at most", "sum of KL", "4 bits", "8 bits", "float"), rows, "<>>>>>"))
    found = chosen.allocation
    promise = f"under {found.kl_promised:.2e} promised" if found.kl_promised < float("inf") else "no promise"
    print(
        f"KL as a whole: {found.kl_calibration:.2e} on {found.num_samples} calibration samples, {promise}, "
        f"{found.kl_held_out:.2e} on {found.num_held_out} held out"
    )


def _num_bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise InputError(f"--max-size {text}: give a size above 0, as 1.5GB, 800MB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])
