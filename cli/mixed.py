"""The recipe int4-mixed: its budget, the table that shows what other budgets would give, and its variant."""

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.apply import quantize_package
from ..quant.recipe import METHODS, MIXED_NAME, Recipe, Rule, WeightFormat, name_with_method
from ..runtime.errors import InputError, RecipeError
from ..runtime.package import Package
from .progress import Progress
from .table import table

if TYPE_CHECKING:
    from ..export.calibrate import Calibrator, OpenRole
    from ..export.mixed import Budget, Mixed

__all__ = ["add_budget", "budget_of", "check_mixed", "quantize_mixed"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB)?", re.IGNORECASE)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def add_budget(parser: argparse.ArgumentParser) -> None:
    """--max-size, --max-kl, --name."""
    parser.add_argument(
        "--max-size", metavar="SIZE", help=f"of the files of {MIXED_NAME}: 1.5GB, 800MB, or that of a variant: int4"
    )
    parser.add_argument(
        "--max-kl", metavar="KL", type=float, help=f"that {MIXED_NAME} may have on answers, a mean in nats: 0.01"
    )
    parser.add_argument("--name", help=f"of the variant (default: {MIXED_NAME} and the method), to make several")


def check_mixed(args: argparse.Namespace) -> bool:
    """True for int4-mixed. Raises InputError and RecipeError where options do not go together."""
    if args.recipe != MIXED_NAME:
        for name in ("max_size", "max_kl", "name"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: goes with --recipe {MIXED_NAME}")
        return False
    if args.calibration is None:
        raise RecipeError(f"recipe {MIXED_NAME}: bits are chosen by what answers lose; give --calibration DIR")
    if args.method not in (None, *METHODS):
        raise RecipeError(f"method {args.method!r} is unknown; known methods are {', '.join(METHODS)}")
    if args.kv_cache is not None:
        raise RecipeError(f"recipe {MIXED_NAME}: --kv-cache {args.kv_cache}: weights alone are measured; leave it out")
    return True


def budget_of(args: argparse.Namespace, package: Package) -> "Budget":
    """The budget that the arguments give. Raises InputError where there is none, or two, or it is no size."""
    from ..export.mixed import Budget  # torch is needed from here on

    return Budget(None if args.max_size is None else _num_bytes(args.max_size, package), args.max_kl)


def quantize_mixed(
    args: argparse.Namespace, package: Package, calibrator: "Calibrator", open_role: "OpenRole", progress: Progress
) -> tuple[Package, Recipe]:
    """Measures, chooses and writes. Raises RecipeError where the package has a variant of that name already."""
    from ..export.mixed import choose_bits

    budget, method = budget_of(args, package), args.method or "rtn"
    name = args.name or (MIXED_NAME if method == "rtn" else name_with_method(MIXED_NAME, method))
    if name in package.manifest.variants:
        raise RecipeError(f"{package.path}: has a variant {name!r}; give this one another name by --name")
    Recipe(name, (Rule("*/*.weight", WeightFormat(bits=4)),))  # a name that cannot be is told before any work
    with tempfile.TemporaryDirectory(prefix="vlmport-") as folder:
        chosen = choose_bits(
            calibrator,
            open_role,
            package.manifest.target,
            budget,
            Path(folder),
            name=name,
            method=method,
            block_size=args.block_size or 32,
            progress=progress,
        )
        _print_choice(chosen)
        after = quantize_package(
            package.path,
            chosen.recipe,
            graphs=chosen.graphs,
            sources=chosen.sources,
            progress=progress,
            calibrate=chosen.codes,
            allocation=chosen.allocation,
        )
    return after, chosen.recipe


def _print_choice(chosen: "Mixed") -> None:
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


def _num_bytes(text: str, package: Package) -> int:
    if text in package.manifest.variants:
        return package.size(text)
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        variants = ", ".join(package.manifest.variants)
        raise InputError(f"--max-size {text}: give a size above 0, as 1.5GB or 800MB, or a variant: {variants}")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])
