"""Make a package from a checkpoint: trace, lower, store the weights by each recipe.

The output is whole or not there; an existing package is replaced only with --overwrite.
"""

import argparse
import time
from pathlib import Path

from ..export.build import export_checkpoint
from ..export.lower import TARGETS
from ..quant.feasible import check_method
from ..quant.recipe import BUILTIN_NAMES
from ..validate.selfcheck import write_selfcheck
from .calibration import add_calibration, calibration_options, recipe_of
from .progress import Progress
from .table import table

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a Hugging Face checkpoint")
    parser.add_argument("-o", "--output", metavar="PACKAGE", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--recipe",
        metavar="R",
        nargs="+",
        action="extend",
        help=f"{', '.join(BUILTIN_NAMES)} or a .json file; several make several variants (default: fp32)",
    )
    parser.add_argument(
        "--block-size", metavar="N", type=int, help="weights a scale in 4-bit and 8-bit recipes (default: 32)"
    )
    add_calibration(parser)
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="what the graphs will run on (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace PACKAGE if it is a package")


def execute(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    recipes = [recipe_of(args, name, args.target) for name in dict.fromkeys(args.recipe or ["fp32"])]
    check_method(recipes, args.method)
    with Progress("export") as progress:
        package = export_checkpoint(
            args.checkpoint,
            args.output,
            recipes,
            target=args.target,
            calibration=calibration_options(args),
            overwrite=args.overwrite,
            progress=progress,
            # A package whose graphs cannot answer is not put in place. Answers are recorded only where the graphs run.
            finish=write_selfcheck if args.target == "cpu" else lambda folder: None,
        )
    rows = [(name, f"{package.size(name) / 1e6:.1f} MB") for name in package.manifest.variants]
    print(table(("variant", "size"), rows, "<>"))
    print(f"{package.path}: {len(rows)} variants in {time.perf_counter() - started:.1f} s")
    return 0
