"""`vlmport verify`: is this package whole, and does this box compute what the box of the export did?

First the sha256 of every file, then the bundled self-check on each variant; with --variant, of what is that variant's.
Needs the runtime alone. Exits with 1 when a stage differs beyond kernels' noise, 2 when the package is damaged or has
no self-check.
"""

import argparse
import json
import time

from ..runtime.package import Package
from ..validate.compare import StageRow
from ..validate.gates import Outcome, worst
from ..validate.selfcheck import check_selfcheck
from .progress import Progress
from .table import table

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", help="folder that `vlmport export` made")
    parser.add_argument("--variant", metavar="V", help="files and self-check of this one only (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    package = Package.open(args.package)
    with Progress("verify") as progress:
        variants = package.manifest.variants if args.variant is None else [package.variant(args.variant).name]
        names = package.files_of(variants)
        package.verify(lambda name: progress(names.index(name), len(names), name), names)
        checked = check_selfcheck(package, args.variant, progress)
    outcomes: dict[str, Outcome] = {name: _outcome(rows) for name, rows in checked.items()}
    outcome = worst(outcomes.values()) or "FAIL"
    seconds = time.perf_counter() - started
    if args.json:
        document = {"outcome": outcome, "num_files": len(names), "seconds": round(seconds, 3), "variants": outcomes}
        print(json.dumps(document, indent=1))
    else:
        print(f"{len(names)} files as vlmport.json says")
        print(_render(checked))
        print(f"{outcome} in {seconds:.1f} s")
    return 1 if outcome == "FAIL" else 0


def _outcome(rows: tuple[StageRow, ...]) -> Outcome:
    return worst(row.outcome for row in rows if row.outcome is not None) or "FAIL"


def _render(checked: dict[str, tuple[StageRow, ...]]) -> str:
    lines = [
        [name, row.stage, f"{row.values.get('max_abs', row.values.get('num_different', 0.0)):.2e}", row.outcome or ""]
        for name, rows in checked.items()
        for row in rows
    ]
    return table(["variant", "stage", "max error", "outcome"], lines, "<<><")
