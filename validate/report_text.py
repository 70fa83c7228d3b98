"""report.md, and the tables of a task that the terminal shows too; all from the JSON of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from .advice import raising

__all__ = ["inputs_line", "markdown", "reference_name", "task_lines", "task_showcase"]


def markdown(document: Mapping[str, Any]) -> str:
    """The report for people, from its JSON alone."""
    package, reference = document["package"], document["reference"]
    lines = [
        f"# Parity of {package['name']}: {document['outcome']}",
        "",
        f"Reference: {', '.join(f'{key} {value}' for key, value in reference.items())}. "
        f"{document['num_samples']} samples. Provider {document['provider']}.",
        f"{len(package['files'])} files of the package were judged. Gates: {document['gates']['origin']}.",
        "",
    ]
    lines += [f"- {variant['name']}: {text}" for variant in document["variants"] if (text := inputs_line(variant))]
    lines.append("")
    if all(variant["task"] for variant in document["variants"]):
        lines += [*_task_section(document), ""]
    for variant in document["variants"]:
        lines += [*_variant_section(variant), ""]
    lines += ["## Files judged", "", "| file | sha256 |", "|---|---|"]
    lines += [f"| package: {name} | `{sha256}` |" for name, sha256 in package["files"].items()]
    lines += [f"| reference: {name} | `{sha256}` |" for name, sha256 in document["reference_files"].items()]
    lines += [f"| task: {name} | `{sha256}` |" for name, sha256 in document["task_files"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join([*lines, "", "## Versions", "", versions, ""])


def inputs_line(variant: Mapping[str, Any]) -> str:
    """Whether a variant was given what the reference was; empty where golden cases have their inputs as stages."""
    proof = variant.get("inputs")
    if not proof:
        return ""
    text = f"inputs equal on {proof['num_equal']:,} of {proof['num_samples']:,} samples, by sha256"
    names = dict.fromkeys(f"{each['input']} of {each['sample']}" for each in proof["different"])
    first = ", ".join(list(names)[:3])
    return f"{text}; not equal: {first}{' and others' if len(names) > 3 else ''}" if names else text


def reference_name(document: Mapping[str, Any]) -> str:
    """What its answers are shown under."""
    reference = document["reference"]
    return "PyTorch" if document["mode"] == "reference" else f"reference, {reference.get('variant', document['mode'])}"


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


def _task_section(document: Mapping[str, Any]) -> list[str]:
    variants = document["variants"]
    header, rows = task_lines(variants)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    for item, answers in task_showcase(variants):
        lines += ["", f"{item['id']}, `{item['image']}`: {item['question']}", ""]
        given = {"expected": item["expected"], reference_name(document): item["reference"], **answers}
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
    if advice := raising(variant):
        lines += ["", advice]
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
