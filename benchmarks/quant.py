"""`python -m benchmarks.quant`: recipes and methods, and what others offer, by what they cost the answers.

What was found of a row's answers is kept as long as its graphs, the questions and the reference are the same: rows can
be made a few at a time. Speeds are measured in each run, all rows of a table together, and mean something on an idle
box alone.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vlmport.cli.bench import box
from vlmport.cli.main import main as vlmport
from vlmport.cli.progress import Progress
from vlmport.runtime.errors import VlmportError
from vlmport.runtime.package import Package, file_entry
from vlmport.runtime.schema import from_json, to_json
from vlmport.validate.reference import load_reference

from .document import put_between
from .quant_inputs import QuantInputs
from .quant_measure import Reference, measure_torch, measure_variant, reference_runs, round_trip
from .quant_peers import (
    BASE,
    add_variant,
    float_graph,
    onnxruntime_blocks,
    onnxruntime_dynamic,
    save_bitsandbytes,
)
from .quant_plan import Group, QuantRow, load_plan
from .quant_report import SCHEMA, QuantReport, RowReport, markdown, text
from .quant_speed import decode_speeds

__all__ = ["main"]

_TOWERS = ("vision_encoder", "projector")
_RECIPES = Path(__file__).with_name("recipes")


class RowError(Exception):
    """A row that cannot be made, in one line."""


@dataclass(frozen=True)
class Bench:
    """One run: what it reads, and one group of it at a time."""

    inputs: QuantInputs
    group: Group
    progress: Progress

    @property
    def checkpoint(self) -> Path:
        return self.inputs.checkpoint(self.group.checkpoint)

    @property
    def package(self) -> Path:
        return self.inputs.folder / "packages" / f"{self.group.checkpoint}-{self.inputs.num_samples}"

    def open(self) -> Reference:
        """The float package, and the answers of the checkpoint."""
        if not self.package.exists():
            _vlmport("export", str(self.checkpoint), "-o", str(self.package), "--recipe", "fp32")
        digest = _digest(file_entry(self.checkpoint / "model.safetensors").sha256, _task_sha(self.inputs))
        folder = self.inputs.folder / "references" / digest
        return reference_runs(self.checkpoint, self.package, self.inputs.task(), folder, self.progress)

    def rows(self, rows: Sequence[QuantRow], *, with_speed: bool) -> list[RowReport]:
        """Makes the variants and measures them."""
        reference = self.open()
        reports: list[RowReport] = []
        runnable: dict[int, tuple[Path, str]] = {}
        for number, row in enumerate(rows):
            self.progress(0, 0, row.name)
            try:
                if row.maker == "bitsandbytes":
                    reports.append(self._torch(row, reference))
                    continue
                package, variant, seconds = self._imported() if row.maker == "imported" else self._variant(row)
            except RowError as error:
                reports.append(RowReport(row.name, self.group.name, error=str(error)))
                continue
            runnable[number] = (package, variant)
            reports.append(self._row(row, package, variant, seconds, reference))
        if with_speed and runnable:
            speeds = decode_speeds(list(runnable.values()), reference.runs[0].sample.messages, self.progress)
            for number, speed in zip(runnable, speeds, strict=True):
                reports[number] = replace(reports[number], tokens_per_second=speed)
        return reports

    def _row(
        self, row: QuantRow, package: Path, variant: str, seconds: float | None, reference: Reference
    ) -> RowReport:
        opened = Package.open(package)
        graphs = opened.variant(variant).graphs.values()
        shas = [opened.manifest.files[f"onnx/{file}"].sha256 for graph in graphs for file in graph.files]
        file = self._cached(row, *shas)
        if not file.exists():
            quality = measure_variant(package, variant, reference, self.progress)
            largest = None
            if row.maker == "imported":
                with Progress("round trip") as progress:
                    largest = round_trip(package, variant, load_reference(self._bitsandbytes()), reference, progress)
            _write(file, RowReport(row.name, self.group.name, opened.size(variant), seconds, quality, largest))
        allocation = opened.variant(variant).allocation
        if allocation is None:
            return _read(file)
        promise = {"kl_calibration": allocation.kl_calibration, "kl_promised": allocation.kl_promised}
        return replace(_read(file), **promise)

    def _variant(self, row: QuantRow) -> tuple[Path, str, float]:
        """Package, variant and the seconds it took to make, which stand beside the package."""
        name = _slug(row)
        known = self.package.with_name(f"{self.package.name}-variants.json")
        made: dict[str, tuple[str, float]] = json.loads(known.read_text("utf-8")) if known.exists() else {}
        if name not in made:
            started = time.perf_counter()
            variant = self._make(row)
            made[name] = (variant, time.perf_counter() - started)
            known.write_text(json.dumps(made), encoding="utf-8")
        return self.package, *made[name]

    def _make(self, row: QuantRow) -> str:
        if row.maker == "vlmport":
            recipe = str(_RECIPES / row.recipe) if row.recipe.endswith(".json") else row.recipe
            arguments = ["--recipe", recipe, *row.options]
            if row.method is not None:
                arguments += ["--method", row.method]
            if row.needs_data:
                arguments += ["--calibration", str(self.inputs.calibration())]
            before = set(Package.open(self.package).manifest.variants)
            _vlmport("quantize", str(self.package), *arguments)
            after = Package.open(self.package).manifest.variants
            return next((name for name in after if name not in before), row.recipe)
        assert row.maker == "onnxruntime", row.maker
        assert row.method is not None, row.name
        _vlmport("quantize", str(self.package), "--recipe", str(_RECIPES / f"{BASE}.json"))
        name = f"peer-{_slug(row)}"
        if row.method == "dynamic":
            floats = {role: float_graph(self.package, "fp32", role) for role in (*_TOWERS, "decoder")}
            add_variant(self.package, name, {role: onnxruntime_dynamic(model) for role, model in floats.items()})
        else:
            decoder = float_graph(self.package, BASE, "decoder")
            add_variant(self.package, name, {"decoder": onnxruntime_blocks(decoder, row.method, row.bits)})
        return name

    def _bitsandbytes(self) -> Path:
        folder = self.inputs.folder / "checkpoints" / f"{self.group.checkpoint}-nf4"
        if not folder.exists():
            save_bitsandbytes(self.checkpoint, folder)
        return folder

    def _imported(self) -> tuple[Path, str, float | None]:
        package = self.package.with_name(f"{self.package.name}-nf4")
        if not package.exists():
            _vlmport("export", str(self._bitsandbytes()), "-o", str(package), "--recipe", "fp32")
        return package, "fp32", None

    def _torch(self, row: QuantRow, reference: Reference) -> RowReport:
        weights = self._bitsandbytes() / "model.safetensors"
        file = self._cached(row, file_entry(weights).sha256)
        if not file.exists():
            quality = measure_torch(load_reference(weights.parent), self.package, reference, self.progress)
            _write(file, RowReport(row.name, self.group.name, weights.stat().st_size, None, quality))
        return _read(file)

    def _cached(self, row: QuantRow, *shas: str) -> Path:
        own = file_entry(self.checkpoint / "model.safetensors").sha256
        digest = _digest(SCHEMA, row.name, self.group.name, own, _task_sha(self.inputs), *shas)
        return self.inputs.folder / "rows" / f"{digest}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.command == "render":
            report = from_json(QuantReport, json.loads(args.file.read_text(encoding="utf-8")))
            put_between(args.into, "bench-quant", markdown(report))
            return 0
        report = _run(args)
    except VlmportError as error:
        print(f"bench-quant: error: {error}", file=sys.stderr)
        return 2
    file = args.folder / "bench-quant.json"
    file.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    print(f"{text(report)}\n\nalso in {file}; `python -m benchmarks.quant render {file} --into DOC` puts it into DOC")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make and measure rows; writes DIR/bench-quant.json")
    run.add_argument("--folder", metavar="DIR", type=Path, default=Path("build"), help="default: build")
    run.add_argument("--num", metavar="N", type=int, default=300, help="held-out questions (default: 300)")
    run.add_argument("--samples", metavar="N", type=int, default=128, help="calibration pairs (default: 128)")
    run.add_argument("--no-speed", action="store_true", help="leave decode speeds out")
    run.add_argument("--rows", metavar="NAME", nargs="+", default=[], help="rows whose names begin so (default: all)")
    run.add_argument("--groups", metavar="GROUP", nargs="+", default=[], help="demo, outliers, int2 (default: all)")
    rendered = commands.add_parser("render", help="the tables as Markdown, between the bench-quant marks of DOC")
    rendered.add_argument("file", metavar="FILE", type=Path)
    rendered.add_argument("--into", metavar="DOC", type=Path, required=True)
    return parser


def _run(args: argparse.Namespace) -> QuantReport:
    logging.disable(logging.WARNING)  # peers tell every step of theirs
    plan = load_plan(tuple(args.rows), tuple(args.groups))
    inputs = QuantInputs(args.folder / "bench-quant", args.num, args.samples)
    rows: list[RowReport] = []
    for group in plan.groups:
        with Progress(f"bench-quant {group.name}") as progress:
            bench = Bench(inputs, group, progress)
            chosen = [row for row in plan.rows if group.name in row.groups]
            if chosen:
                rows += bench.rows(chosen, with_speed=not args.no_speed)
    return QuantReport(
        SCHEMA, datetime.now(UTC).date().isoformat(), box(), args.num, args.samples, plan.groups, tuple(rows)
    )


def _vlmport(*arguments: str) -> None:
    """A command of this project. Raises RowError with what it says where it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = vlmport(arguments)
    except SystemExit as error:  # of argparse
        status = int(error.code or 0)
    if status != 0:
        raise RowError((said.getvalue().strip().splitlines() or [f"status {status}"])[-1])


def _task_sha(inputs: QuantInputs) -> str:
    return _digest(*(file_entry(file).sha256 for file in sorted(inputs.task().glob("*.json*"))))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _slug(row: QuantRow) -> str:
    return "".join(char if char.isalnum() else "-" for char in row.name.lower())


def _write(file: Path, report: RowReport) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")


def _read(file: Path) -> RowReport:
    return from_json(RowReport, json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
