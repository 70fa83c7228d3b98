"""The report of a validation: JSON first; Markdown and one HTML page are made from it.

The JSON holds all that was measured, so that another page (attribution, HTML) can be drawn from it alone. Numbers
that JSON cannot write are the strings "inf", "-inf" and "nan". The copy inside the package is bound to its manifest by
sha256: a report of other bytes is no evidence.
"""

import dataclasses
import errno
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..runtime.package import MANIFEST_NAME, Package, file_entry
from .compare import Comparison, NotCompared, StageRow
from .gates import GateTable, Outcome, worst
from .intervals import Ratio
from .statistics import Statistics

__all__ = [
    "REPORT_SCHEMA",
    "Example",
    "Report",
    "TaskScore",
    "VariantReport",
    "manifest_sha256",
    "markdown",
    "plain",
    "report_json",
    "task_lines",
    "task_showcase",
    "versions",
    "worst_examples",
    "write_report",
]

REPORT_SCHEMA = "vlmport-report/2"
_NUM_EXAMPLES = 10
_VERSIONED = ("vlmport", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "pillow", "torch", "transformers")


@dataclass(frozen=True)
class Example:
    """One position where candidate and reference differ most. Steps count from the first answer token."""

    sample: str
    stage: str
    position: int
    kl: float  # nats
    same_top1: bool
    reference_margin: float  # nats


@dataclass(frozen=True)
class TaskScore:
    """Scores of whole answers (scorers.SCORERS), and what became of the reference's. Shares are of the items."""

    task: str
    scorer: str
    num_items: int
    score: float  # mean
    by_kind: Mapping[str, float]
    reference_score: float
    recovery: float  # score / reference_score
    num_lost: int  # the reference was right, the variant is not
    num_gained: int
    flips: float  # (lost + gained) / items
    num_changed: int  # answers that are not the reference's, right or wrong
    changed: float
    tokens_per_second: float  # decoding, free-running
    intervals: Mapping[str, Ratio]  # score, reference_score, recovery, flips, changed, with their 95 % intervals
    answers: tuple[Mapping[str, Any], ...]  # by item: see tasks


@dataclass(frozen=True)
class VariantReport:
    """One variant against the reference."""

    name: str
    precisions: Mapping[str, str]  # by role
    size: int  # bytes of its graphs and weights
    rows: tuple[StageRow, ...]
    not_compared: tuple[NotCompared, ...]
    examples: tuple[Example, ...]
    seconds: float
    task: TaskScore | None = None
    statistics: Statistics | None = None
    layers: tuple[Any, ...] = ()  # insides.LayerDrift
    waterfall: Any = None  # waterfall.Waterfall
    bisect: Mapping[str, Any] | None = None  # insides.bisection

    @property
    def outcome(self) -> Outcome:
        """The worst of all gates. Nothing judged is a failure: there is no evidence."""
        return worst(row.outcome for row in self.rows if row.outcome is not None) or "FAIL"


@dataclass(frozen=True)
class Report:
    mode: Literal["golden", "reference"]
    reference: Mapping[str, str]  # what the variants were compared with
    package: Package
    manifest_sha256: str
    provider: str
    versions: Mapping[str, str]
    samples: tuple[str, ...]
    gates: GateTable
    variants: tuple[VariantReport, ...]
    noise: Any = None  # insides.Noise
    sweep: Sequence[Mapping[str, Any]] = ()  # sweep.SweepResult with its outcome

    @property
    def outcome(self) -> Outcome:
        return worst(variant.outcome for variant in self.variants) or "FAIL"


def versions() -> dict[str, str]:
    """Versions of what took part, as far as installed, and the machine's."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def worst_examples(records: Iterable[Comparison]) -> tuple[Example, ...]:
    """The positions of largest divergence over prefill and decode."""
    found: list[Example] = []
    for record in records:
        if record.logits is None:
            continue
        errors = record.logits
        for position in errors.kl.argsort()[::-1][:_NUM_EXAMPLES]:
            example = Example(
                sample=record.sample,
                stage=record.stage,
                position=int(position),
                kl=float(errors.kl[position]),
                same_top1=bool(errors.same[position]),
                reference_margin=float(errors.margin[position]),
            )
            found.append(example)
    return tuple(sorted(found, key=lambda example: -example.kl)[:_NUM_EXAMPLES])


def report_json(report: Report) -> dict[str, Any]:
    """The report as what `json.dumps(allow_nan=False)` takes."""
    manifest = report.package.manifest
    document = {
        "schema": REPORT_SCHEMA,
        "mode": report.mode,
        "outcome": report.outcome,
        "reference": report.reference,
        "package": {
            "name": report.package.path.name,
            "manifest_sha256": report.manifest_sha256,
            "source": manifest.source.name,
            "source_files": {name: entry.sha256 for name, entry in manifest.source.files.items()},
            "target": manifest.target,
        },
        "provider": report.provider,
        "versions": report.versions,
        "num_samples": len(report.samples),
        "samples": report.samples,
        "noise": report.noise,
        "sweep": report.sweep,
        "gates": {"origin": report.gates.origin, "tie_margin": report.gates.tie_margin, "table": report.gates.gates},
        "variants": [
            {"outcome": variant.outcome, **{f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}}
            for variant in report.variants
        ],
    }
    return plain(document)


def write_report(report: Report, folder: Path, media: Path | None = None) -> tuple[Path, ...]:
    """Writes report.json, .md and .html into `folder` and, if that can be written to, the package's parity/.

    media: folder that the images of examples are relative to (the task's), for their thumbnails.
    Returns the files in `folder`. Without matplotlib (extra `report`) there is no HTML; one of an earlier run goes.
    """
    document = report_json(report)
    texts = {
        "report.json": json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(document),
        "report.html": _html(document, media),
    }
    _write(texts, folder)
    try:
        _write(texts, report.package.path / "parity")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    return tuple(folder / name for name, text in texts.items() if text is not None)


def markdown(document: Mapping[str, Any]) -> str:
    """The report for people, from its JSON alone."""
    package, reference = document["package"], document["reference"]
    lines = [
        f"# Parity of {package['name']}: {document['outcome']}",
        "",
        f"Reference: {', '.join(f'{key} {value}' for key, value in reference.items())}. "
        f"{document['num_samples']} samples. Provider {document['provider']}.",
        f"Manifest sha256 `{package['manifest_sha256']}`. Gates: {document['gates']['origin']}.",
        "",
    ]
    if all(variant["task"] for variant in document["variants"]):
        lines += [*_task_section(document["variants"]), ""]
    for variant in document["variants"]:
        lines += [*_variant_section(variant), ""]
    lines += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in document["versions"].items()), ""]
    return "\n".join(lines)


def task_lines(variants: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of a task, one row a variant, from the report's JSON.

    changed: answers other than the reference's; flipped: those of them that became right or wrong by it.
    """
    header = ("variant", "MB", variants[0]["task"]["scorer"].replace("_", " "), "reference", "changed", "flipped")
    header += ("mean KL", "same top-1", "tokens/s", "gate")
    rows: list[tuple[str, ...]] = []
    for variant in variants:
        task = variant["task"]
        values = next((row["values"] for row in variant["rows"] if row["stage"] == "answer_logits"), {})
        row = (
            variant["name"],
            f"{variant['size'] / 1e6:.2f}",
            f"{task['score']:.1%}",
            f"{task['reference_score']:.1%}",
            f"{task['num_changed']} of {task['num_items']}",
            f"{task['num_lost'] + task['num_gained']} of {task['num_items']}",
            _number(values.get("kl_mean")),
            f"{values['same_top1']:.2%}" if "same_top1" in values else "",
            f"{task['tokens_per_second']:.0f}",
            variant["outcome"],
        )
        rows.append(row)
    return header, rows


def task_showcase(
    variants: Sequence[Mapping[str, Any]], num: int = 2
) -> list[tuple[Mapping[str, str], dict[str, str]]]:
    """A few items with the answer of each variant. Items on which the variants differ come first."""
    answers = {variant["name"]: variant["task"]["answers"] for variant in variants}
    items: Sequence[Mapping[str, str]] = next(iter(answers.values()))
    found = [
        (item, {name: given[number]["answer"] for name, given in answers.items()}) for number, item in enumerate(items)
    ]
    return sorted(found, key=lambda pair: len({pair[0]["reference"], *pair[1].values()}) == 1)[:num]


def _task_section(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    header, rows = task_lines(variants)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    for item, answers in task_showcase(variants):
        lines += ["", f"{item['id']}, `{item['image']}`: {item['question']}", ""]
        given = {"expected": item["expected"], "PyTorch": item["reference"], **answers}
        lines += [f"- {name}: `{answer!r}`" for name, answer in given.items()]
    return lines


def _variant_section(variant: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {variant['name']}: {variant['outcome']}",
        "",
        "| stage | samples | max abs | min cosine | mean KL | same top-1 | limit broken | outcome |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in variant["rows"]:
        values = row["values"]
        broken = "; ".join(
            f"{gate['metric']} {_number(gate['value'])} ({_number(gate['limit'])} asked)"
            for gate in row["gates"]
            if gate["outcome"] != "PASS"
        )
        cells = [_number(values.get(name)) for name in ("max_abs", "cosine_min", "kl_mean", "same_top1")]
        outcome = row["outcome"] or "reported"
        lines.append(f"| {row['stage']} | {row['num_samples']} | {' | '.join(cells)} | {broken} | {outcome} |")
    notes = [note for row in variant["rows"] for note in row["notes"]]
    lines += ["", *(f"- {note}" for note in notes)]
    if variant["not_compared"]:
        reasons: dict[str, set[str]] = {}
        for record in variant["not_compared"]:
            reasons.setdefault(f"{record['stage']}: {record['reason']}", set()).add(record["sample"])
        lines += ["", "Not compared:", "", *(f"- {reason} ({len(found)} samples)" for reason, found in reasons.items())]
    return lines


def _number(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.7g}" if abs(value) > 0.9 else f"{value:.3g}"


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as what JSON holds; numbers that it cannot write as their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, StageRow):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return plain({"outcome": value.outcome, **fields})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _html(document: Mapping[str, Any], media: Path | None) -> str | None:
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from .page import page  # draws with matplotlib

    def picture(name: str) -> bytes | None:
        file = None if media is None else media / name
        return file.read_bytes() if file is not None and file.is_file() else None

    return page(document, picture)


def _write(texts: Mapping[str, str | None], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            _replace(folder / name, text)


def _replace(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        error.filename = error.filename or str(file)  # a full disk comes without one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def manifest_sha256(package: Package) -> str:
    """Binds a report to the package's manifest, which holds the hash of every other file."""
    return file_entry(package.path / MANIFEST_NAME).sha256
