"""`python -m benchmarks make | run | render | nodes`: a random checkpoint, a measurement, what came of it."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmport.runtime.errors import InputError, VlmportError
from vlmport.runtime.schema import SchemaError, from_json, to_json

from .checkpoint import make_checkpoint
from .plan import PARTS, Plan, smoke_plan
from .process import Memory
from .shapes import load_shape, shape_names

if TYPE_CHECKING:
    from .report import ShapeReport

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return {"make": _make, "run": _run, "render": _render, "nodes": _nodes}[args.command](args)
    except (VlmportError, SchemaError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"benchmarks: error: {' '.join(error.cmd)} failed:\n{error.output}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write a checkpoint of random weights")
    make.add_argument("shape", metavar="SHAPE", help=", ".join(shape_names()))
    make.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True)
    make.add_argument("--seed", metavar="N", type=int, default=0)
    make.add_argument("--json", action="store_true", help="print JSON")
    measured = commands.add_parser("run", help="measure a shape; writes DIR/bench-SHAPE.json")
    measured.add_argument("shape", metavar="SHAPE", help=", ".join(shape_names()))
    measured.add_argument("--folder", metavar="DIR", type=Path, default=Path("build"), help="default: build")
    measured.add_argument("--checkpoint", metavar="DIR", type=Path, help="default: DIR/bench/checkpoints/SHAPE")
    measured.add_argument("--recipe", metavar="R", nargs="+", help="default: int4 int4_b128 int8")
    measured.add_argument(
        "--parts", metavar="PART", nargs="+", choices=PARTS, help=f"of {' '.join(PARTS)}; default: all but the last"
    )
    measured.add_argument("--skip", metavar="PART", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    measured.add_argument(
        "--add", action="store_true", help="keep what DIR/bench-SHAPE.json has of other recipes and parts"
    )
    measured.add_argument(
        "--samples", metavar="N", type=int, nargs="+", help="of the part calibrate: an export each (default: 8)"
    )
    measured.add_argument("--method", metavar="M", default="gptq", help="of the part calibrate (default: gptq)")
    measured.add_argument("--smoke", action="store_true", help="int4 alone, small images, short prompts")
    rendered = commands.add_parser("render", help="the tables of a bench-SHAPE.json as Markdown")
    rendered.add_argument("file", metavar="FILE", type=Path)
    rendered.add_argument(
        "--into", metavar="DOC", type=Path, help="put it between the marks <!-- SHAPE --> of this file"
    )
    nodes = commands.add_parser("nodes", help="the nodes of each graph in a bench-SHAPE.json, as JSON")
    nodes.add_argument("file", metavar="FILE", type=Path)
    return parser


def _make(args: argparse.Namespace) -> int:
    if args.output.exists():
        raise InputError(f"{args.output}: exists already; choose another -o")
    started = time.perf_counter()
    make_checkpoint(load_shape(args.shape), args.output, seed=args.seed)
    said = {
        "size": sum(file.stat().st_size for file in args.output.iterdir()),
        "seconds": time.perf_counter() - started,
        "peak_memory": Memory.of().peak,
    }
    line = f"{args.output}: {said['size'] / 1e9:.2f} GB in {said['seconds']:.1f} s"
    print(json.dumps(said) if args.json else line)
    return 0


def _run(args: argparse.Namespace) -> int:
    from .measure import run  # these need onnx, which writing a checkpoint does not
    from .report import merged, text

    plan = Plan(args.shape, args.folder / "bench", checkpoint=args.checkpoint)
    if args.smoke:
        plan = smoke_plan(plan)
    if args.recipe:
        plan = replace(plan, recipes=tuple(args.recipe))
    if args.samples:
        plan = replace(plan, calibration=tuple(args.samples))
    parts = tuple(part for part in args.parts or plan.parts if part not in args.skip)
    file = args.folder / f"bench-{args.shape}.json"
    earlier = _read(file) if args.add and file.exists() else None  # one that cannot be read is told now, not at the end
    report = run(replace(plan, parts=parts, method=args.method))
    if earlier is not None:
        report = merged(earlier, report)
    print(text(report), flush=True)  # first: what took minutes is not lost to a full disk
    file.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    print(f"\nalso in {file}; `python -m benchmarks render {file}` makes Markdown of it")
    return 0


def _render(args: argparse.Namespace) -> int:
    from .report import markdown

    report = _read(args.file)
    if args.into is None:
        print(markdown(report), end="")
        return 0
    begin, end = f"<!-- {report.shape} -->\n", f"<!-- /{report.shape} -->"
    before, found, rest = args.into.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{args.into}: has no {begin.strip()} ... {end} to put the tables between; add the two lines")
    args.into.write_text(f"{before}{begin}{markdown(report)}{end}{after}", encoding="utf-8")
    return 0


def _nodes(args: argparse.Namespace) -> int:
    variant = next(iter(_read(args.file).variants.values()))
    print(json.dumps(variant.nodes, indent=2))
    return 0


def _read(file: Path) -> "ShapeReport":
    from .report import ShapeReport

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); make it with `python -m benchmarks run`") from error
    return from_json(ShapeReport, content)


if __name__ == "__main__":
    sys.exit(main())
