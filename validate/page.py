"""report.html: one self-contained page drawn from the JSON of a report, and from the pictures of its worst examples.

The page has no script and loads nothing: it opens from a file, under the strictest browser, and prints. What the JSON
does not hold is left out; nothing is computed here that the JSON does not say, except shares and sums for a caption.
"""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from . import sections
from .advice import broken_gates, raising
from .page_examples import Pictures, examples
from .page_parts import Document, Table, interval, kl_of, number, share

__all__ = ["Verdict", "page"]

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_NUM_BROKEN = 4  # broken limits told beside a verdict; the page has all
_NO_CAUSE = 1e-9  # nats: a divergence below rounding errors of float32 has no cause to name


@dataclass(frozen=True)
class Verdict:
    name: str
    outcome: str
    sentence: str
    lines: tuple[str, ...]


def page(document: Document, pictures: Pictures = lambda name: None) -> str:
    """The HTML of a report's JSON (report.REPORT_SCHEMA). `pictures` gives the file of an example's image."""
    drawn = (
        sections.waterfall(document),
        sections.layers(document),
        sections.steps(document),
        sections.pareto(document),
        sections.answers(document),
        examples(document, pictures),
        sections.sweep(document),
        sections.bisect(document),
        sections.gates(document),
        sections.evidence(document),
    )
    bodies = [section for section in drawn if section is not None]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    reference = document["reference"]
    code = reference.get("code") or reference.get("upstream", "")
    against = reference.get("checkpoint") or reference.get("golden") or reference.get("package", "")
    subtitle = (
        f"Reference: {', '.join(filter(None, (against, reference.get('variant'))))}{f' ({code})' if code else ''}. "
        f"{document['num_samples']} samples{_inputs_note(document)}. {document['provider']}."
    )
    return template.render(
        outcome=document["outcome"],
        package=document["package"],
        subtitle=subtitle,
        sections=[("verdict", "Verdict"), *((section.id, section.title) for section in bodies)],
        verdicts=[_verdict(variant) for variant in document["variants"]],
        summary=_summary(document),
        summary_note=_noise_note(document),
        bodies=bodies,
    )


def _verdict(variant: Document) -> Verdict:
    gates = [gate for row in variant["rows"] for gate in row["gates"]]
    broken = broken_gates(variant)
    task = variant.get("task")
    if task:
        sentence = f"{task['num_items'] - task['num_changed']} of {task['num_items']} answers are the reference's"
        sentence += f"; {task['num_lost']} lost, {task['num_gained']} gained."
    else:
        sentence = f"{len(gates) - len(broken)} of {len(gates)} limits held."
    lines = [f"Broken: {text}." for text in broken[:_NUM_BROKEN]]
    if len(broken) > _NUM_BROKEN:
        lines.append(f"And {len(broken) - _NUM_BROKEN} more, below.")
    if (cause := _main_cause(variant)) is not None:
        lines.append(cause)
    if advice := raising(variant):
        lines.append(advice)
    return Verdict(variant["name"], variant["outcome"], sentence, tuple(lines))


def _main_cause(variant: Document) -> str | None:
    steps = [s for s in (variant.get("waterfall") or {}).get("steps", ()) if s["skipped"] is None]
    added = [(max(number(step["added"]["mean"]), 0.0), step["name"]) for step in steps]
    total = sum(value for value, _ in added)
    if total < _NO_CAUSE:
        return None
    value, name = max(added)
    return f"{value / total:.0%} of its divergence comes from {name}."


def _summary(document: Document) -> Table:
    header = [
        "variant",
        "outcome",
        "MB",
        "mean KL, nats [95 %]",
        "same first token",
        "answers right",
        "flips",
        "tokens/s",
    ]
    rows: list[list[str]] = []
    for variant in document["variants"]:
        task = variant.get("task") or {}
        shares = task.get("intervals", {})
        kl = kl_of(variant)
        row = [
            variant["name"],
            variant["outcome"],
            f"{variant['size'] / 1e6:,.2f}",
            "" if kl is None else interval(kl["mean"], kl["ci_low"], kl["ci_high"], ".2g"),
            "" if kl is None else f"{number(kl['same_top1']):.2%}",
            share(shares.get("score"), task.get("score")),
            share(shares.get("flips"), task.get("flips")),
            f"{task['tokens_per_second']:,.0f}" if task else "",
        ]
        rows.append(row)
    if not any(row[-1] for row in rows):
        header, rows = header[:5], [row[:5] for row in rows]
    caption = "KL(reference || variant) of the next token along the reference's answer; brackets are 95 % intervals"
    return Table(caption, header, rows)


def _inputs_note(document: Document) -> str:
    """In brackets: were the samples the same on both sides? The section of evidence tells which were not."""
    proofs = [variant["inputs"] for variant in document["variants"] if variant.get("inputs")]
    if not proofs:
        return ""
    if all(proof["num_equal"] == proof["num_samples"] for proof in proofs):
        return ", inputs equal on all of them by sha256"
    return f", INPUTS NOT EQUAL on {max(proof['num_samples'] - proof['num_equal'] for proof in proofs)} of them"


def _noise_note(document: Document) -> str:
    noise = document.get("noise")
    if not noise:
        return ""
    kl = noise["kl"]
    return (
        f"The reference's own noise ({noise['what']}): mean KL "
        f"{interval(kl['mean'], kl['ci_low'], kl['ci_high'], '.2g')} nats "
        f"over {kl['num_positions']} positions, same first token {number(kl['same_top1']):.2%}. "
        "Below it, a difference says nothing."
    )
