"""`vlmport inspect`: what a package holds, and whether its last verdict is of these bytes.

No graph is loaded, and no weight is read that was not written after the report, so it takes a moment for a package of
any size and needs the runtime only. With --report every file that was judged is read.
With --placement it loads the graphs and tells instead where their nodes run (placement.py).
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..runtime.errors import InputError, PackageError
from ..runtime.manifest import GraphFile, RangeRecord, Source, TensorInfo
from ..runtime.package import Package
from ..runtime.schema import to_json
from ..validate.judged import changed_since
from .placement import placement
from .placement import render as render_placement
from .table import table

__all__ = ["Contents", "GraphContents", "VariantContents", "add_arguments", "contents", "execute", "folded", "render"]

Label = TypeVar("Label")


@dataclass(frozen=True)
class GraphContents:
    """A graph of one variant. `size` is in bytes, weights included."""

    graph: str
    precision: str
    size: int
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    formats: dict[str, str]  # parameter -> how it is stored


@dataclass(frozen=True)
class VariantContents:
    """A variant. `size` is in bytes, each file counted once."""

    size: int
    graphs: dict[str, GraphContents]  # by role
    ranges: RangeRecord | None  # where a guard watched how large values get
    parity: str  # outcome of the last validation, or "not validated", or "out of date" and which files changed since


@dataclass(frozen=True)
class Contents:
    """What `vlmport inspect` tells, and with --json prints."""

    package: str
    family: str
    target: str
    source: Source
    roles: tuple[str, ...]
    max_length: int | None  # tokens
    versions: dict[str, str]
    size: int  # bytes of all files
    variants: dict[str, VariantContents]
    notes: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", help="folder that `vlmport export` made")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--placement", action="store_true", help="tell which provider runs which nodes, and why some are on the CPU"
    )
    parser.add_argument("--variant", metavar="V", help="with --placement: of this variant alone")
    parser.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        help="a report.json: does its verdict hold for these bytes? Reads every file (default: the package's own copy)",
    )


def execute(args: argparse.Namespace) -> int:
    package = Package.open(args.package)
    if args.placement:
        where = placement(package, args.variant)
        print(json.dumps(to_json(where), indent=2, ensure_ascii=False) if args.json else render_placement(where))
        return 0
    if args.variant is not None:
        raise InputError("--variant: means nothing without --placement, as all variants are told of; leave it out")
    found = contents(package, args.report)
    print(json.dumps(to_json(found), indent=2, ensure_ascii=False) if args.json else render(found))
    return 0


def contents(package: Package, report: Path | None = None) -> Contents:
    """Gathers what the manifest of `package` tells. Reads no graph, unless it was written after the last report.

    report: a report.json to tell the outcome of, in place of the package's own copy of the last one.
    """
    manifest, parity = package.manifest, _last_parity(package, report)
    variants = {
        name: VariantContents(
            size=package.size(name),
            graphs={role: _graph(package, graph) for role, graph in variant.graphs.items()},
            ranges=variant.ranges,
            parity=parity.get(name, "not validated"),
        )
        for name, variant in manifest.variants.items()
    }
    return Contents(
        package=str(package.path),
        family=manifest.family,
        target=manifest.target,
        source=manifest.source,
        roles=manifest.roles,
        max_length=manifest.cache.max_length if manifest.cache else None,
        versions=manifest.versions,
        size=sum(entry.size for entry in manifest.files.values()),
        variants=variants,
        notes=manifest.notes,
    )


def _graph(package: Package, graph: GraphFile) -> GraphContents:
    names = {f"onnx/{name}" for name in graph.files}
    return GraphContents(
        graph=graph.graph,
        precision=graph.precision,
        size=sum(package.manifest.files[name].size for name in names),
        inputs=graph.inputs,
        outputs=graph.outputs,
        formats=graph.formats,
    )


def _last_parity(package: Package, file: Path | None) -> dict[str, str]:
    """Outcome by variant of a validation, as far as it was of these very bytes.

    Of the package's own copy of a report, what was written since is read; of another `file`, everything. Raises
    PackageError where the file is not a report.
    """
    own = package.path / "parity" / "report.json"
    since = own.stat().st_mtime_ns if file is None and own.is_file() else None
    if file is None and since is None:
        return {}
    file = file or own
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        outcomes = {str(variant["name"]): str(variant["outcome"]) for variant in report["variants"]}
        mode, judged = str(report["mode"]), {str(k): str(v) for k, v in dict(report["package"]["files"]).items()}
    except FileNotFoundError:
        raise InputError(f"--report {file}: there is no such file") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PackageError(f"{file}: not a report ({error!r}); run `vlmport validate` again") from error
    return {
        name: _told(outcome, mode, changed_since(package, name, judged, since))
        for name, outcome in outcomes.items()
        if name in package.manifest.variants
    }


def _told(outcome: str, mode: str, changed: Sequence[str]) -> str:
    if not changed:
        return f"{outcome} ({mode})"
    return f"out of date, was {outcome} ({mode}); changed since: {', '.join(changed)}"


def render(found: Contents) -> str:
    """The text that `vlmport inspect` prints."""
    parts = [_head(found), _sizes(found), _ranges_of(found)]
    for role in found.roles:
        parts += [_tensors(found, role), _formats(found, role)]
    return "\n\n".join(part for part in parts if part)


def _head(found: Contents) -> str:
    source = found.source
    rows = [
        ("package", f"{found.package}, {_size(found.size)}"),
        ("family", f"{found.family}, for {found.target}"),
        ("source", f"{source.name}, {source.num_parameters:,} parameters in {source.dtype}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
    ]
    if found.max_length is not None:
        rows.append(("context", f"{found.max_length:,} tokens"))
    return table((), [*rows, *(("note", note) for note in found.notes)])


def _sizes(found: Contents) -> str:
    """A variant's size counts shared files once, but for every variant that has them."""
    rows = [
        (name, *(_size(variant.graphs[role].size) for role in found.roles), _size(variant.size), variant.parity)
        for name, variant in found.variants.items()
    ]
    return table(("variant", *found.roles, "all", "parity"), rows, "<" + ">" * (len(found.roles) + 1))


def _ranges_of(found: Contents) -> str:
    """What stays float32 in variants that compute in float16, and how large it gets."""
    rows: list[tuple[str, str, str]] = []
    for variant, contents in found.variants.items():
        record = contents.ranges
        if record is None:
            continue
        about = f"{record.num_operators} operators in float32" if record.num_operators else "nothing is larger"
        rows.append((variant, f"above {record.limit:g}", about))
        rows += [("", f"  {name}", f"{size:.4g}") for name, size in record.exceeded.items()]
    return table(("range guard", "", ""), rows) if rows else ""


def _tensors(found: Contents, role: str) -> str:
    """Inputs and outputs are the same in every variant, so the first one stands for all."""
    graph = next(iter(found.variants.values())).graphs[role]
    rows: list[tuple[str, str, str]] = []
    for way, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        labels = {name: f"{info.dtype} [{', '.join(info.shape)}]" for name, info in tensors.items()}
        rows += [(f"  {way}", name, label) for name, label in folded(labels)]
    return f"{role}\n{table((), rows)}"


def _formats(found: Contents, role: str) -> str:
    """A row a parameter, a column a variant; layers that are stored alike share a row."""
    columns = {name: variant.graphs[role].formats for name, variant in found.variants.items()}
    names = dict.fromkeys(name for formats in columns.values() for name in formats)
    cells = {name: tuple(formats.get(name, "-") for formats in columns.values()) for name in names}
    if not cells:
        return ""
    return table((f"  weights of {role}", *columns), [(f"  {name}", *row) for name, row in folded(cells)])


def folded(labels: Mapping[str, Label]) -> list[tuple[str, Label]]:
    """Joins names that differ in their first number only and have equal labels: `layers.0-3,7.norm`."""
    groups: dict[tuple[str, str, Label], list[int]] = {}
    for name, label in labels.items():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        if number is None:
            groups[name, "", label] = []
        else:
            groups.setdefault((name[: number.start()], name[number.end() :], label), []).append(int(number[0]))
    return [(head + _ranges(numbers) + tail, label) for (head, tail, label), numbers in groups.items()]


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _size(num_bytes: int) -> str:
    """Decimal units, as disks are sold and `du --si` counts."""
    if num_bytes < 1_000_000:
        return f"{num_bytes / 1e3:.1f} kB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1_000_000_000 else f"{num_bytes / 1e9:,.2f} GB"
