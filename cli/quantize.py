"""Add a variant to a package, from its own float32 weights or from the checkpoint it was made of.

The package is never half-written: interrupted at any moment, it is what it was or has the whole variant.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.apply import open_float_graph, quantize_package
from ..quant.feasible import check_calibration, check_method
from ..quant.recipe import BUILTIN_NAMES, MIXED_NAME, Recipe
from ..runtime.errors import CheckpointError
from ..runtime.package import Package, file_entry
from ..validate.selfcheck import write_selfcheck
from .calibration import add_calibration, calibration_options, recipe_of
from .mixed import add_budget, check_mixed, quantize_mixed
from .progress import Progress

if TYPE_CHECKING:
    from ..export.calibrate import Calibrator
    from ..export.feeds import CalibrationOptions
    from ..export.graphs import FloatGraphs

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", type=Path, help="folder that `vlmport export` made")
    parser.add_argument(
        "--recipe",
        metavar="R",
        required=True,
        help=f"{', '.join(BUILTIN_NAMES)}, {MIXED_NAME} or a .json file; names the variant",
    )
    parser.add_argument("--block-size", metavar="N", type=int, help="weights a scale in int8 and int4 (default: 32)")
    add_calibration(parser)
    add_budget(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="read weights from here, not from the package's fp32 variant",
    )


def execute(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    is_mixed = check_mixed(args)
    before = Package.open(args.package)
    target = before.manifest.target
    recipe = None if is_mixed else recipe_of(args, args.recipe, target)
    options = calibration_options(args)
    if recipe is not None:
        check_method([recipe], args.method)
        check_calibration([recipe], target, args.calibration)
    with Progress("quantize") as progress:
        calibrate = None if options is None else _calibrator(before, options, progress)
        graphs = None if args.checkpoint is None else _float_graphs(before, args.checkpoint, progress)
        if recipe is None:
            assert calibrate is not None
            open_role = graphs.open_role if graphs is not None else functools.partial(open_float_graph, before)
            after, recipe = quantize_mixed(args, before, calibrate, open_role, progress)
        else:
            after = quantize_package(
                args.package,
                recipe,
                graphs=None if graphs is None else graphs.graphs,
                sources=None if graphs is None else graphs.sources,
                progress=progress,
                calibrate=calibrate,
            )
    return _report(before, after, recipe, time.perf_counter() - started)


def _report(before: Package, after: Package, recipe: Recipe, seconds: float) -> int:
    is_new = recipe.name not in before.manifest.variants
    golden = after.path / "parity" / "golden"
    if golden.is_dir() and (is_new or not (golden / f"{recipe.name}.npz").is_file()):  # else nothing to extend
        write_selfcheck(after.path)
    if not is_new:
        print(f"{after.path}: has {recipe.name} already; nothing to do")
        return 0
    added = sum(entry.size for name, entry in after.manifest.files.items() if name not in before.manifest.files)
    print(
        f"{after.path}: added {recipe.name}, {after.size(recipe.name) / 1e6:.1f} MB "
        f"of which {added / 1e6:.1f} MB are new, in {seconds:.1f} s"
    )
    return 0


def _calibrator(package: Package, options: "CalibrationOptions", progress: Progress) -> "Calibrator":
    from ..export.calibrate import package_calibrator  # torch is needed from here on

    return package_calibrator(package, options, progress)


def _float_graphs(package: Package, checkpoint: Path, progress: Progress) -> "FloatGraphs":
    from ..export.checkpoint import Checkpoint  # these two need torch, which the package's own weights do not
    from ..export.graphs import float_graphs

    for file in Checkpoint.open(checkpoint).files:
        if package.manifest.source.files.get(file.name) != file_entry(file):
            raise CheckpointError(f"{file}: is not what {package.path} was made from; give the checkpoint it came from")
    return float_graphs(checkpoint, package.manifest.target, lambda what: progress(0, 0, what))
