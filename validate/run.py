"""The two validations, from start to report: against golden folders, and against the checkpoint in PyTorch."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer

from ..runtime.model import Model
from ..runtime.package import Package, file_entry
from .compare import Comparison, NotCompared, StageRow, stage_columns, stage_rows
from .gates import GateTable, judge
from .golden import Golden
from .golden_compare import compare_golden
from .images import ImageReference, ImageSample, compare_image_golden, compare_image_sample
from .journal import Journal
from .reference import ReferenceModel, run_reference
from .report import Report, TaskScore, VariantReport, manifest_sha256, versions, worst_examples
from .samples import Sample
from .shards import Found, Questions, compare_in_shards
from .statistics import AnswerEvidence, Statistics, classifier, summarize
from .tasks import ANSWER_STAGE, Task, score

if TYPE_CHECKING:
    from ..export.family import RoleSpec
    from .insides import Insides, Plan

__all__ = ["made_from", "validate_golden", "validate_images", "validate_reference"]

Progress = Callable[[int, int, str], None]
_NUM_DETAILED = 8  # items of a task that are compared at every stage; all are at their answers


def validate_golden(
    package: Package, goldens: Sequence[Golden], variants: Sequence[str], gates: GateTable, progress: Progress
) -> Report:
    """Each variant against every case of the golden folders, of which there is at least one."""
    reports: list[VariantReport] = []
    provider = ""
    for name in variants:
        started = time.perf_counter()
        # Golden activations are of unit scale, so float32 is held to absolute limits.
        columns = {
            kind: "fp32-unit" if column == "fp32" else column
            for kind, column in stage_columns(package.variant(name)).items()
        }
        records: list[Comparison | NotCompared] = []
        with ExitStack() as models:
            loaded: dict[str | None, Model] = {}

            def load(rule: str | None, name: str = name, loaded: dict[str | None, Model] = loaded) -> Model:
                if rule not in loaded:
                    loaded[rule] = models.enter_context(Model.load(package.path, name, video_rule=rule))
                return loaded[rule]

            for golden in goldens:
                if "decoder" in package.manifest.roles:
                    records += compare_golden(golden, load, gates.tie_margin[columns["generation"]], progress)
                else:
                    records += compare_image_golden(golden, load(None))
            provider = _provider(load(None))
        rows = stage_rows([r for r in records if isinstance(r, Comparison)], gates, columns)
        reports.append(_variant_report(package, name, records, rows, time.perf_counter() - started))
    reference = {"golden": ", ".join(golden.path.name for golden in goldens), "upstream": goldens[0].upstream}
    samples = [f"{golden.path.name}/{case}" for golden in goldens for case in golden.cases]
    return _report("golden", reference, package, provider, samples, gates, reports)


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
    """
    positions = package.manifest.positions
    rule = reference.video_rule if positions is not None and positions.video_rule is not None else None
    columns = {name: stage_columns(package.variant(name)) for name in variants}
    margins = {name: gates.tie_margin[columns[name]["generation"]] for name in variants}
    questions = Questions(samples, len(samples) if task is None else _NUM_DETAILED, task, margins)
    found = compare_in_shards(package, reference, questions, variants, rule, journal, progress)
    insides = (
        None if plan is None else _look_inside(package, checkpoint, reference, samples, variants, rule, plan, progress)
    )
    reports: list[VariantReport] = []
    for name in variants:
        records = found[name].records
        scored = None if task is None else score(task, found[name].answers)
        rows = stage_rows([r for r in records if isinstance(r, Comparison)], gates, columns[name])
        if scored is not None:
            rows += (_task_row(scored, gates, columns[name]["task"]),)
        told = None if task is None else _statistics(package, found[name], margins[name])
        reports.append(_variant_report(package, name, records, rows, found[name].seconds, scored, told))
    about = {"checkpoint": checkpoint.name, "code": reference.origin, "positions": rule or "one rule only"}
    if task is not None:
        about["task"] = task.name
    provider = next((one.provider for one in found.values() if one.provider), "as in an earlier part of this run")
    report = _report("reference", about, package, provider, [sample.id for sample in samples], gates, reports)
    return report if insides is None else _with_insides(report, insides)


def _with_insides(report: Report, insides: "Insides") -> Report:
    variants = [
        replace(variant, layers=inside.layers, waterfall=inside.waterfall, bisect=inside.bisect)
        for variant in report.variants
        for inside in [insides.variants[variant.name]]
    ]
    rows = [row for inside in insides.variants.values() for row in inside.sweep]
    return replace(report, variants=tuple(variants), noise=insides.noise, sweep=rows)


def _look_inside(
    package: Package,
    checkpoint: Path,
    reference: ReferenceModel,
    samples: Sequence[Sample],
    variants: Sequence[str],
    rule: str | None,
    plan: "Plan",
    progress: Progress,
) -> "Insides":
    """The insides, on the first samples: the reference answers these once more, as nothing of it was kept."""
    from .insides import look_inside  # torch is needed from here on

    roles = _roles(checkpoint)
    with tempfile.TemporaryDirectory(prefix="vlmport-reference-") as folder:
        with Model.load(package.path, variants[0], video_rule=rule) as model:
            runs = run_reference(reference, model, samples[: plan.num_samples], 0, Path(folder), progress)
        return look_inside(package, reference, roles, runs, variants, plan, progress)


def _roles(checkpoint: Path) -> "Mapping[str, RoleSpec]":
    from ..export.checkpoint import Checkpoint
    from ..export.family import family_of, roles_of

    opened = Checkpoint.open(checkpoint)
    return roles_of(family_of(opened.config, checkpoint / "config.json"), opened.config, opened.documents)


def validate_images(
    package: Package,
    checkpoint: Path,
    reference: ImageReference,
    samples: Sequence[ImageSample],
    variants: Sequence[str],
    gates: GateTable,
    progress: Progress,
    plan: "Plan | None" = None,
) -> Report:
    """The same for a package without a decoder: embeddings and class scores of images."""
    reports: list[VariantReport] = []
    provider = ""
    for name in variants:
        started = time.perf_counter()
        records: list[Comparison | NotCompared] = []
        with Model.load(package.path, name) as model:
            for number, sample in enumerate(samples):
                progress(number, len(samples), f"{name}, {sample.id}")
                records += compare_image_sample(model, sample, reference)
            provider = _provider(model)
        columns = stage_columns(package.variant(name))
        rows = stage_rows([r for r in records if isinstance(r, Comparison)], gates, columns)
        reports.append(_variant_report(package, name, records, rows, time.perf_counter() - started))
    about = {"checkpoint": checkpoint.name, "code": reference.origin}
    report = _report("reference", about, package, provider, [sample.id for sample in samples], gates, reports)
    if plan is None:
        return report
    from .insides import look_inside_images

    roles = _roles(checkpoint)
    return _with_insides(report, look_inside_images(package, reference, roles, samples[-1], variants, plan, progress))


def made_from(package: Package, checkpoint: Path) -> bool:
    """Whether the weight files of a checkpoint folder are those that the package was made from, by sha256."""
    files = [path for path in sorted(checkpoint.glob("*.safetensors")) if path.name in package.manifest.source.files]
    return bool(files) and all(file_entry(path) == package.manifest.source.files[path.name] for path in files)


def _provider(model: Model) -> str:
    """What ONNX Runtime runs the graphs with, as the session says."""
    return str(model.session(model.manifest.roles[-1]).raw.get_providers()[0])


def _statistics(package: Package, found: Found, tie_margin: float) -> Statistics:
    """Of the answers of one variant: their errors along the reference's answers are the records of that stage."""
    errors = {r.sample: r.logits for r in found.records if isinstance(r, Comparison) and r.stage == ANSWER_STAGE}
    answers = [
        AnswerEvidence(answer.item.id, logits, answer.reference_ids, answer.ids, answer.num_patches)
        for answer in found.answers
        if (logits := errors[answer.item.id]) is not None
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


def _variant_report(
    package: Package,
    name: str,
    records: Sequence[Comparison | NotCompared],
    rows: tuple[StageRow, ...],
    seconds: float,
    scored: TaskScore | None = None,
    told: Statistics | None = None,
) -> VariantReport:
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


def _report(
    mode: Literal["golden", "reference"],
    reference: Mapping[str, str],
    package: Package,
    provider: str,
    samples: Sequence[str],
    gates: GateTable,
    reports: Sequence[VariantReport],
) -> Report:
    return Report(
        mode=mode,
        reference=reference,
        package=package,
        manifest_sha256=manifest_sha256(package),
        provider=provider,
        versions=versions(),
        samples=tuple(samples),
        gates=gates,
        variants=tuple(reports),
    )
