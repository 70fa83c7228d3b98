"""`vlmport validate`: how far a package is from its reference, stage by stage, by the gates.

Against the checkpoint in PyTorch (--reference) or another package or variant (--against), on built-in samples or a task
folder, or against golden folders (--golden). Prints a table, writes report.json, report.md and report.html, exits with
1 when a gate fails or nothing was compared.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import InputError
from ..runtime.package import MANIFEST_NAME, Package, file_entry
from ..validate.advice import raising
from ..validate.compare import StageRow
from ..validate.gates import default_gates, load_gates
from ..validate.report import Report, VariantReport, report_json, versions, write_report
from ..validate.report_text import inputs_line, reference_name, task_lines, task_showcase
from .progress import Progress
from .table import table

__all__ = ["add_arguments", "execute", "render"]

_FOLDER = Path("build", "report")
_STAGE_HEADER = ["stage", "samples", "max abs", "min cosine", "mean KL", "same", "outcome", "worst", "broken limits"]
_NUM_NOTES = 12  # notes printed a variant; the report has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", help="folder that `vlmport export` made")
    against = parser.add_mutually_exclusive_group(required=True)
    against.add_argument("--reference", metavar="CHECKPOINT", type=Path, help="checkpoint to run in PyTorch")
    against.add_argument("--golden", metavar="DIR", type=Path, help="golden folder, or a folder of golden folders")
    against.add_argument(
        "--against",
        metavar="PACKAGE[:V]",
        help="variant V (default: the first) of a package, or of this one: no PyTorch",
    )
    parser.add_argument(
        "--variant",
        metavar="V",
        nargs="+",
        action="extend",
        help="variants (default: all, or the first of a package with --golden)",
    )
    parser.add_argument("--task", metavar="DIR", type=Path, help="task folder: questions and answers of your own")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --reference: run the Python files of the checkpoint itself; they can do all that you can",
    )
    parser.add_argument("--report", metavar="DIR", type=Path, default=_FOLDER, help=f"default: {_FOLDER}")
    parser.add_argument("--gates", metavar="FILE", type=Path, help="TOML that replaces limits of the built-in table")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="with --reference or --against: the first N samples alone"
    )
    parser.add_argument(
        "--bisect", action="store_true", help="with --reference: name the first operator that leaves its tolerance"
    )
    parser.add_argument("--no-sweep", action="store_true", help="with --reference: leave out the inputs that bite")
    parser.add_argument(
        "--no-insides", action="store_true", help="with --reference: answers alone; no layers, waterfall or sweep"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def execute(args: argparse.Namespace) -> int:
    _check(args)
    package = Package.open(args.package)
    default = [package.variant().name] if args.golden is not None else package.manifest.variants
    variants = tuple(package.variant(name).name for name in dict.fromkeys(args.variant or default))
    gates = default_gates() if args.gates is None else load_gates(args.gates)
    journal = None
    with Progress("validate") as progress:
        if args.golden is not None:
            report = _golden(package, args.golden, variants, gates, progress)
        elif args.against is not None:
            report, journal = _against(package, args, variants, gates, progress)
        else:
            report, journal = _reference(package, args, variants, gates, progress)
    if report is None:
        print(f"FAIL: no golden folder in {args.golden} belongs to the checkpoint that {package.path} was made from")
        return 1
    files = write_report(report, args.report, args.task)
    if journal is not None:
        journal.remove()
    if args.json:
        print(json.dumps(report_json(report), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(render(report))
        for variant in report_json(report)["variants"]:
            if advice := raising(variant):
                print(f"{variant['name']}: {advice}")
        for variant in report.variants:
            if variant.bisect is not None:
                print(f"{variant.name}, {_first_fault(variant.bisect)}")
        print(f"\n{report.outcome}: report in {', '.join(map(str, files))}")
    return 1 if report.outcome == "FAIL" else 0


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for options that do not go together."""
    if args.golden is not None and args.task is not None:
        raise InputError("--task: golden folders have questions of their own; use it with --reference or --against")
    if args.golden is not None and args.limit is not None:
        raise InputError("--limit: golden folders are compared whole; use it with --reference or --against")
    for option in ("trust_remote_code", "bisect", "no_sweep", "no_insides"):
        if getattr(args, option) and args.reference is None:
            raise InputError(f"--{option.replace('_', '-')}: is about PyTorch; add --reference CHECKPOINT")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit} is not at least 1")


def render(report: Report) -> str:
    """The report as text: a table with a row a stage for each variant, what went wrong, what was not compared.

    With a task, one table of answers and two items; stages only where a gate did not pass.
    """
    if all(variant.task is not None for variant in report.variants):
        return _render_task(report)
    return "\n\n".join(_render_variant(variant) for variant in report.variants)


def _first_fault(bisection: Mapping[str, Any]) -> str:
    """One line: the first operator that is wrong by itself, or that there is none."""
    first = bisection["first"]
    if first is None:
        worst = max(bisection["points"], key=lambda point: point["own"] / max(point["tolerance"], 1e-12))
        return f"no operator leaves its tolerance; nearest is {worst['role']} {worst['name']} ({worst['own']:.2g})"
    layer = "" if first["layer"] is None else f"layer {first['layer']}, "
    return (
        f"first operator at fault: {first['role']}, {layer}{first['name']} ({', '.join(first['operators'])}): "
        f"relative L2 {first['own']:.2g} on the reference's own inputs, {first['tolerance']:g} is its tolerance"
    )


def _golden(package: Package, root: Path, variants: Sequence[str], gates: Any, progress: Progress) -> Report | None:
    """None where none of several golden folders is of this package's checkpoint."""
    from ..validate.golden import find_goldens, load_golden  # needs safetensors, which the runtime does not
    from ..validate.run_golden import made_from, validate_golden

    folders = find_goldens(root)
    if len(folders) > 1:
        folders = tuple(folder for folder in folders if made_from(package, folder))
    if not folders:
        return None
    return validate_golden(package, [load_golden(folder) for folder in folders], variants, gates, progress)


def _reference(
    package: Package, args: argparse.Namespace, variants: Sequence[str], gates: Any, progress: Progress
) -> tuple[Report, Any]:
    """The report, and the journal that goes once it is written."""
    from ..validate.insides import Plan  # needs torch and transformers
    from ..validate.reference import load_reference
    from ..validate.run import validate_reference

    checkpoint = args.reference
    plan = None if args.no_insides else Plan(sweep=not args.no_sweep, bisect=args.bisect)
    if "decoder" not in package.manifest.roles:
        if args.trust_remote_code:
            raise InputError("--trust-remote-code: this package is compared with modules of its family; leave it out")
        _refuse_task(package, args.task)
        return _images_reference(package, args, variants, gates, progress, plan), None
    samples, task = _samples(package, args)
    reference = load_reference(checkpoint, trust_remote_code=args.trust_remote_code)
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(checkpoint.iterdir())]
    with _journal(package, args, samples, task, gates, {"checkpoint": files, "origin": reference.origin}) as journal:
        report = validate_reference(
            package, checkpoint, reference, samples, task, variants, gates, progress, journal, plan
        )
    return report, journal


def _against(
    package: Package, args: argparse.Namespace, variants: Sequence[str], gates: Any, progress: Progress
) -> tuple[Report, Any]:
    from ..runtime.model import Model
    from ..validate.against import open_other
    from ..validate.run import validate_against
    from ..validate.run_images import validate_images_against

    other, name = open_other(args.against)
    if ("decoder" in package.manifest.roles) != ("decoder" in other.manifest.roles):
        raise InputError(f"--against {args.against}: one of the two packages has no decoder; they answer nothing alike")
    if other.path.resolve() == package.path.resolve() and not args.variant:
        variants = [variant for variant in variants if variant != name] or variants
    with Model.load(other.path, name) as model:
        if "decoder" not in package.manifest.roles:
            from ..validate.images import built_in_images

            _refuse_task(package, args.task)
            images = built_in_images()[: args.limit]
            return validate_images_against(package, model, images, variants, gates, progress), None
        samples, task = _samples(package, args)
        with _journal(package, args, samples, task, gates, {"against": [_manifest_sha256(other), name]}) as journal:
            report = validate_against(package, model, samples, task, variants, gates, progress, journal)
    return report, journal


def _refuse_task(package: Package, folder: Path | None) -> None:
    if folder is not None:
        raise InputError(f"--task: {package.path} has no decoder, so it answers no questions; leave it out")


def _samples(package: Package, args: argparse.Namespace) -> tuple[Sequence[Any], Any]:
    """What is asked, and the task that it is of, if there is one."""
    from ..validate.samples import built_in_samples
    from ..validate.tasks import load_task, task_samples

    if args.task is None:
        return built_in_samples(package.manifest)[: args.limit], None
    task = load_task(args.task)
    return task_samples(task, args.task)[: args.limit], task


def _journal(
    package: Package,
    args: argparse.Namespace,
    samples: Sequence[Any],
    task: Any,
    gates: Any,
    reference: Mapping[str, Any],
) -> Any:
    """The record of what is found, which depends on both sides and on what is asked."""
    from ..validate.journal import Journal, digest_of
    from ..validate.shards import JOURNAL_TYPES

    depends = {
        "package": _manifest_sha256(package),
        "reference": reference,
        "samples": [[sample.id, list(sample.messages), sample.max_new_tokens] for sample in samples],
        "task": None if task is None else [str(args.task), dict(task.files.sha256)],
        "margins": dict(gates.tie_margin),
        "code": versions(),
    }
    return Journal(args.report / "unfinished", digest_of(depends), JOURNAL_TYPES)


def _manifest_sha256(package: Package) -> str:
    return file_entry(package.path / MANIFEST_NAME).sha256


def _images_reference(
    package: Package, args: argparse.Namespace, variants: Sequence[str], gates: Any, progress: Progress, plan: Any
) -> Report:
    from ..validate.images import built_in_images
    from ..validate.reference import load_image_reference
    from ..validate.run_images import validate_images

    reference, samples = load_image_reference(args.reference), built_in_images()[: args.limit]
    return validate_images(package, args.reference, reference, samples, variants, gates, progress, plan)


def _render_variant(variant: VariantReport) -> str:
    rows = [_render_row(row) for row in variant.rows]
    lines = [f"{variant.name}: {variant.outcome}", table(_STAGE_HEADER, rows, "<>>>>><")]
    if text := inputs_line({"inputs": variant.inputs and vars(variant.inputs)}):
        lines.append(f"  {text}")
    notes = [note for row in variant.rows for note in row.notes]
    lines += [f"  {note}" for note in notes[:_NUM_NOTES]]
    if len(notes) > _NUM_NOTES:
        lines.append(f"  ... and {len(notes) - _NUM_NOTES} more notes in the report")
    missing: dict[tuple[str, str], list[str]] = {}
    for record in variant.not_compared:
        missing.setdefault((record.stage, record.reason), []).append(record.sample)
    for (stage, reason), samples in missing.items():
        lines.append(f"  not compared: {stage} ({reason}): {', '.join(dict.fromkeys(samples))}")
    return "\n".join(lines)


def _render_row(row: StageRow) -> list[str]:
    values = row.values
    same = values.get("same_top1")
    if same is None and "num_values" in values:
        same = 1 - values["num_different"] / values["num_values"]
    if same is None and "changed" in values:
        same = 1 - values["changed"]
    broken = [
        f"{gate.metric} was not measured"
        if gate.value is None
        else f"{gate.metric} {gate.value:.4g} {'>' if gate.value > gate.limit else '<'} {gate.limit:g}"
        for gate in row.gates
        if gate.outcome != "PASS"
    ]
    return [
        row.stage,
        str(row.num_samples),
        _format(values.get("max_abs"), ".2e"),
        _format(values.get("cosine_min"), ".7f"),
        _format(values.get("kl_mean"), ".2e"),
        _format(same, ".1%"),
        row.outcome or "reported",
        row.worst_sample if row.outcome not in ("PASS", None) else "",
        "; ".join(broken),
    ]


def _render_task(report: Report) -> str:
    document = report_json(report)
    variants = document["variants"]
    header, rows = task_lines(variants)
    parts = [table(header, rows, "<>>>>>>>>")]
    for item, answers in task_showcase(variants):
        given = {"expected": item["expected"], reference_name(document): item["reference"], **answers}
        lines = [[name, _printable(answer)] for name, answer in given.items()]
        parts.append(f"{item['image']}: {item['question']}\n{_indent(table((), lines))}")
    parts.append("\n".join(f"{variant['name']}: {inputs_line(variant)}" for variant in variants))
    broken = [
        [variant.name, *_render_row(row)]
        for variant in report.variants
        for row in variant.rows
        if row.outcome not in ("PASS", None)
    ]
    if broken:
        parts.append(table(["variant", *_STAGE_HEADER], broken, "<<>>>>><"))
    return "\n\n".join(parts)


def _printable(answer: str) -> str:
    """One line that cannot steer a terminal: a model may answer with control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in answer.strip().replace("\n", " / "))


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
