"""The report of a validation: JSON first; Markdown and one HTML page are made from it.

The JSON holds all that was measured, so that another page can be drawn from it alone; docs/report-format.md explains
its fields. Numbers that JSON cannot write are the strings "inf", "-inf" and "nan". It names the sha256 of every file it
judged: a report of other bytes is no evidence.
"""

import dataclasses
import errno
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..runtime.package import Package
from .compare import Comparison, NotCompared, StageRow
from .gates import INPUT_KINDS, GateTable, Outcome, worst
from .inputs import GivenInputs, InputProof, rolled_up
from .intervals import Ratio
from .report_text import markdown
from .statistics import Statistics

__all__ = [
    "REPORT_SCHEMA",
    "Example",
    "Report",
    "TaskScore",
    "VariantReport",
    "plain",
    "report_json",
    "versions",
    "worst_examples",
    "write_report",
]

REPORT_SCHEMA = "vlmport-report/3"
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
    intervals: Mapping[str, Ratio]  # score, reference_score, recovery, flips, lost, gained, changed
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
    inputs: InputProof | None = None  # None: golden cases, whose inputs are stages of their own
    task: TaskScore | None = None
    statistics: Statistics | None = None
    layers: tuple[Any, ...] = ()  # insides.LayerDrift
    raises: tuple[Any, ...] = ()  # raises.Raise
    waterfall: Any = None  # waterfall.Waterfall
    bisect: Mapping[str, Any] | None = None  # insides.bisection

    @property
    def outcome(self) -> Outcome:
        """The worst of all gates. Nothing judged but what goes in is a failure: there is no evidence."""
        judged = [row for row in self.rows if row.outcome is not None]
        if all(row.kind in INPUT_KINDS for row in judged):
            return "FAIL"
        return worst(row.outcome for row in judged if row.outcome is not None) or "FAIL"


@dataclass(frozen=True)
class Report:
    mode: Literal["golden", "reference", "against"]
    reference: Mapping[str, str]  # what the variants were compared with
    package: Package
    files: Mapping[str, str]  # of the package: sha256 of those that were judged, as they were read
    reference_files: Mapping[str, str]  # the same of the reference
    provider: str
    versions: Mapping[str, str]
    samples: tuple[str, ...]
    gates: GateTable
    variants: tuple[VariantReport, ...]
    inputs: tuple[GivenInputs, ...] = ()  # what the reference was given
    task_files: Mapping[str, str] = field(default_factory=dict[str, str])  # sha256 of questions and settings
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
        "reference_files": report.reference_files,
        "task_files": report.task_files,
        "package": {
            "name": report.package.path.resolve().name,
            "files": report.files,
            "source": manifest.source.name,
            "source_files": {name: entry.sha256 for name, entry in manifest.source.files.items()},
            "target": manifest.target,
        },
        "provider": report.provider,
        "versions": report.versions,
        "num_samples": len(report.samples),
        "samples": report.samples,
        "inputs": _inputs(report.inputs),
        "noise": report.noise,
        "sweep": report.sweep,
        "gates": {"origin": report.gates.origin, "tie_margin": report.gates.tie_margin, "table": report.gates.gates},
        "variants": [
            {"outcome": variant.outcome, **{f.name: getattr(variant, f.name) for f in dataclasses.fields(variant)}}
            for variant in report.variants
        ],
    }
    return plain(document)


def _inputs(given: Sequence[GivenInputs]) -> dict[str, Any] | None:
    """What the reference was given; of a variant's inputs only those that differ are told (InputProof)."""
    if not given:
        return None
    found = [(one.sample, one.reference) for one in given]
    return {"sha256": rolled_up(found), "samples": [{"id": sample, **hashes} for sample, hashes in found]}


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
