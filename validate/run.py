"""Validations from start to report: against the checkpoint in PyTorch, or against another package."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer

from ..runtime.model import Model
from ..runtime.package import Package
from .against import PackageReference
from .answers import ANSWER_STAGE
from .compare import Comparison, NotCompared, StageRow, stage_columns, stage_rows
from .gates import GateTable, judge
from .images import ImageSample
from .inputs import GivenInputs, prove
from .journal import Journal
from .judged import JudgedFiles, hash_checkpoint, hash_package
from .reference import AnsweringReference, ReferenceModel, run_reference
from .report import Report, TaskScore, VariantReport, versions, worst_examples
from .samples import Sample
from .shards import Found, Questions, compare_in_shards
from .statistics import AnswerEvidence, Statistics, classifier, summarize
from .tasks import Answer, Task, score

if TYPE_CHECKING:
    from ..export.family import RoleSpec
    from .insides import Insides, Plan, VariantInsides

__all__ = [
    "Compared",
    "about_package",
    "concluded",
    "roles_of_checkpoint",
    "validate_against",
    "validate_reference",
    "variant_report",
]

Progress = Callable[[int, int, str], None]
_NUM_DETAILED = 8  # items of a task that are compared at every stage; all are at their answers
_ANSWERS = "step_logits"  # where there is no task, every sample is compared at that stage


def validate_reference(
    package: Package,
    checkpoint: Path,
    reference: ReferenceModel,
    samples: Sequence[Sample],
    task: Task | None,
    variants: Sequence[str],
    gates: GateTable,
    progress: Progress,
    journal: Journal | None = None,
    plan: "Plan | None" = None,
) -> Report:
    """Each variant against the checkpoint in PyTorch, over the samples (a task's items, if there is a task).

    `journal` keeps what is found while it goes on. `plan`: how much of the insides is looked at besides; None: nothing.
    Raises PackageError for bytes that are not those of the manifest, InputError where they change meanwhile.
    """
    positions = package.manifest.positions
    rule = reference.video_rule if positions is not None and positions.video_rule is not None else None
    judged = [hash_package(package, variants, progress), hash_checkpoint(checkpoint, progress)]
    columns = {name: stage_columns(package.variant(name)) for name in variants}
    compared = _compare(package, reference, samples, task, columns, gates, progress, journal, rule)
    insides = None
    if plan is not None:
        failed = [variant.name for variant in compared[0] if variant.outcome == "FAIL"]
        insides = _look_inside(package, checkpoint, reference, samples, variants, rule, plan, progress, failed)
    about = {"checkpoint": checkpoint.name, "code": reference.origin, "positions": rule or "one rule only"}
    return concluded("reference", about, package, judged, compared, samples, task, gates, insides)


def validate_against(
    package: Package,
    other: Model,
    samples: Sequence[Sample],
    task: Task | None,
    variants: Sequence[str],
    gates: GateTable,
    progress: Progress,
    journal: Journal | None = None,
) -> Report:
    """Each variant against a variant of another package, or of the same: no PyTorch. Both prepare their own prompts.

    A stage is judged by the looser column of both sides. Raises as `validate_reference` does.
    """
    judged = [hash_package(package, variants, progress), hash_package(other.package, [other.variant.name], progress)]
    reference = PackageReference(other, max(sample.max_new_tokens for sample in samples))
    columns = {name: stage_columns(package.variant(name), other.variant) for name in variants}
    compared = _compare(package, reference, samples, task, columns, gates, progress, journal, None, other)
    return concluded("against", about_package(other), package, judged, compared, samples, task, gates)


Compared = tuple[list[VariantReport], list[GivenInputs], str]


def _compare(
    package: Package,
    reference: AnsweringReference,
    samples: Sequence[Sample],
    task: Task | None,
    columns: Mapping[str, Mapping[str, str]],
    gates: GateTable,
    progress: Progress,
    journal: Journal | None,
    rule: str | None,
    prompter: Model | None = None,
) -> Compared:
    """All variants, what the reference was given, and the provider."""
    margins = {name: gates.tie_margin[column["generation"]] for name, column in columns.items()}
    questions = Questions(samples, len(samples) if task is None else _NUM_DETAILED, task, margins)
    found = compare_in_shards(package, reference, questions, list(columns), rule, journal, progress, prompter)
    reports: list[VariantReport] = []
    for name, one in found.items():
        assert len(one.inputs) == len(one.answers) == len(samples), name
        scored = None if task is None else score(task, _answers(task, one))
        rows = stage_rows([r for r in one.records if isinstance(r, Comparison)], gates, columns[name])
        if scored is not None:
            rows += (_task_row(scored, gates, columns[name]["task"]),)
        told = _statistics(package, one, margins[name], _ANSWERS if task is None else ANSWER_STAGE)
        report = variant_report(package, name, one.records, rows, one.seconds, scored, told)
        reports.append(replace(report, inputs=prove(one.inputs)))
    provider = next((one.provider for one in found.values() if one.provider), "as in an earlier part of this run")
    return reports, next(iter(found.values())).inputs, provider


def _with_inside(variant: VariantReport, inside: "VariantInsides", package: Package, gates: GateTable) -> VariantReport:
    """The report of a variant with what was found inside it; the sweep is judged as a stage of its own."""
    from .sweep import sweep_row  # needs onnx, as all insides do

    column = stage_columns(package.variant(variant.name))["sweep"]
    return replace(
        variant,
        rows=(*variant.rows, *([sweep_row(inside.sweep, gates, column)] if inside.sweep else [])),
        layers=inside.layers,
        raises=inside.raises,
        waterfall=inside.waterfall,
        bisect=inside.bisect,
    )


def _look_inside(
    package: Package,
    checkpoint: Path,
    reference: ReferenceModel,
    samples: Sequence[Sample],
    variants: Sequence[str],
    rule: str | None,
    plan: "Plan",
    progress: Progress,
    failed: Sequence[str],
) -> "Insides":
    """The insides, on the first samples: the reference answers these once more, as nothing of it was kept."""
    from .insides import look_inside  # torch is needed from here on

    roles = roles_of_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(prefix="vlmport-reference-") as folder:
        with Model.load(package.path, variants[0], video_rule=rule) as model:
            runs = run_reference(reference, model, samples[: plan.num_samples], 0, Path(folder), progress)
        return look_inside(package, reference, roles, runs, variants, plan, progress, failed)


def roles_of_checkpoint(checkpoint: Path) -> "Mapping[str, RoleSpec]":
    """What its family makes of it."""
    from ..export.checkpoint import Checkpoint
    from ..export.family import family_of, roles_of

    opened = Checkpoint.open(checkpoint)
    return roles_of(family_of(opened.config, checkpoint / "config.json"), opened.config, opened.documents)


def about_package(other: Model) -> dict[str, str]:
    """A package as a reference, for the report."""
    return {
        "package": other.package.path.resolve().name,
        "variant": other.variant.name,
        "code": PackageReference.origin,
    }


def _answers(task: Task, found: Found) -> list[Answer]:
    return [
        Answer(item, asked.text, asked.reference_text, asked.num_tokens, asked.seconds)
        for item, asked in zip(task.items, found.answers, strict=False)  # --limit asks the first of them alone
    ]


def _statistics(package: Package, found: Found, tie_margin: float, stage: str) -> Statistics:
    """Of the answers of one variant: their errors along the reference's answers are the records of `stage`."""
    errors = {r.sample: r.logits for r in found.records if isinstance(r, Comparison) and r.stage == stage}
    answers = [
        AnswerEvidence(answer.sample, logits, answer.reference_ids, answer.ids, answer.num_patches)
        for answer in found.answers
        if (logits := errors[answer.sample]) is not None
    ]
    tokenizer = Tokenizer.from_file(str(package.path / "tokenizer.json"))
    return summarize(answers, tie_margin, classifier(tokenizer))


def _task_row(scored: TaskScore, gates: GateTable, column: str) -> StageRow:
    values = {
        "score": scored.score,
        "recovery": scored.recovery,
        "flips": scored.flips,
        "changed": scored.changed,
        "num_items": float(scored.num_items),
    }
    for name, found in scored.intervals.items():
        values |= {f"{name}_ci_low": found.ci_low, f"{name}_ci_high": found.ci_high}
    return StageRow(
        stage="answers",
        kind="task",
        column=column,
        num_samples=scored.num_items,
        values=values,
        worst_sample=next((a["id"] for a in scored.answers if a["answer"].strip() != a["reference"].strip()), ""),
        gates=judge(gates, column, "task", "answers", values),
        notes=(),
    )


def variant_report(
    package: Package,
    name: str,
    records: Sequence[Comparison | NotCompared],
    rows: tuple[StageRow, ...],
    seconds: float,
    scored: TaskScore | None = None,
    told: Statistics | None = None,
) -> VariantReport:
    """What is reported of a variant, from its records and their rows."""
    return VariantReport(
        name=name,
        precisions={role: graph.precision for role, graph in package.variant(name).graphs.items()},
        size=package.size(name),
        rows=rows,
        not_compared=tuple(record for record in records if isinstance(record, NotCompared)),
        examples=worst_examples(record for record in records if isinstance(record, Comparison)),
        seconds=seconds,
        task=scored,
        statistics=told,
    )


def concluded(
    mode: Literal["reference", "against"],
    reference: Mapping[str, str],
    package: Package,
    judged: Sequence[JudgedFiles],
    compared: Compared,
    samples: Sequence[Sample] | Sequence[ImageSample],
    task: Task | None,
    gates: GateTable,
    insides: "Insides | None" = None,
) -> Report:
    """The report of what was compared; `judged`: files of the package, then of the reference.

    Raises InputError for a file that changed while it was judged.
    """
    reports, inputs, provider = compared
    if insides is not None:
        reports = [_with_inside(variant, insides.variants[variant.name], package, gates) for variant in reports]
    for files in (*judged, *([] if task is None else [task.files])):
        files.check()
    return Report(
        mode=mode,
        reference=reference if task is None else {**reference, "task": task.name},
        package=package,
        files=judged[0].sha256,
        reference_files=judged[1].sha256,
        provider=provider,
        versions=versions(),
        samples=tuple(sample.id for sample in samples),
        gates=gates,
        variants=tuple(reports),
        inputs=tuple(inputs),
        task_files={} if task is None else task.files.sha256,
        noise=None if insides is None else insides.noise,
        sweep=[] if insides is None else [row for inside in insides.variants.values() for row in inside.sweep],
    )
