"""Prepare a package for this box: copies of its graphs that load by being mapped, kept in the user's cache.

The package itself is left as it is. Copies are found by `run`, `serve`, `bench` and vlmport.runtime on their own.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from ..runtime.errors import InputError
from ..runtime.package import Package
from ..runtime.prepared_copy import cache_folder, only_writer, prepare_graph, prepared_copies, roles_of
from ..runtime.schema import to_json
from .progress import Progress
from .table import table

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", type=Path, help="folder that `vlmport export` made")
    parser.add_argument("--variant", metavar="V", help="which variant (default: the first of the package)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show the copies there are, and which still fit this box")
    action.add_argument("--remove", action="store_true", help="remove the copies of this package, fitting or not")
    parser.add_argument("--json", action="store_true", help="with --list: print JSON")


def execute(args: argparse.Namespace) -> int:
    package = Package.open(args.package)
    if args.json and not args.list:
        raise InputError("--json: means nothing without --list; leave it out")
    if args.variant is not None and (args.list or args.remove):
        raise InputError("--variant: --list and --remove are for all variants; leave it out")
    if args.list:
        return _list(package, as_json=args.json)
    if args.remove:
        return _remove(package)
    roles = roles_of(package, args.variant)
    started, made, size = time.perf_counter(), 0, 0
    with Progress("prepare") as progress:
        for index, role in enumerate(roles):
            progress(index, len(roles), role)
            copy, is_new = prepare_graph(package, role, args.variant)
            made, size = made + is_new, size + copy.size
        progress(len(roles), len(roles), "done")
    with only_writer(cache_folder()):
        for place, _, fits in list(prepared_copies(package)):
            if not fits:  # an older package, CPU or ONNX Runtime
                shutil.rmtree(place)
    if not made:
        print(f"{package.path}: is prepared for this box already, {size / 1e6:.1f} MB in {cache_folder()}")
        return 0
    print(
        f"{package.path}: prepared {', '.join(roles)} of {package.variant(args.variant).name}, {size / 1e6:.1f} MB in "
        f"{cache_folder()}, in {time.perf_counter() - started:.1f} s"
    )
    return 0


def _list(package: Package, *, as_json: bool) -> int:
    copies = list(prepared_copies(package))
    if as_json:
        print(json.dumps([{"path": str(p), "fits": fits} | to_json(copy) for p, copy, fits in copies], indent=2))
    elif not copies:
        print(f"{package.path}: no prepared copy in {cache_folder()}")
    else:
        rows = [
            (copy.graph, f"{copy.size / 1e6:,.1f} MB", copy.onnxruntime, copy.cpu, "yes" if fits else "no", str(place))
            for place, copy, fits in copies
        ]
        print(table(("graph", "size", "ONNX Runtime", "CPU", "fits", "folder"), rows, "<>"))
    return 0


def _remove(package: Package) -> int:
    with only_writer(cache_folder()):
        copies = list(prepared_copies(package))
        for place, _, _ in copies:
            shutil.rmtree(place)
    freed = sum(copy.size for _, copy, _ in copies)
    print(f"{package.path}: removed {len(copies)} copies, {freed / 1e6:.1f} MB, from {cache_folder()}")
    return 0
