"""What `make bench-quant` found: JSON first, a table and Markdown made from it. Divergences are in nats."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmport.cli.table import table

from .quant_plan import Group

__all__ = ["SCHEMA", "Quality", "QuantReport", "RowReport", "markdown", "text"]

SCHEMA = "vlmport-bench-quant/2"
_HEADER = (
    *("", "bytes", "mean KL", "99.9 % KL", "same top-1", "exact", "lost", "gained", "flips", "vision cos p1"),
    *("tokens/s", "made in"),
)
_ALIGN = "<" + ">" * (len(_HEADER) - 1)


@dataclass(frozen=True)
class Quality:
    """Against the checkpoint in PyTorch, float32: logits along its answers, and answers of one's own."""

    kl_mean: float
    kl_ci_low: float
    kl_ci_high: float
    kl_p999: float
    same_top1: float
    exact_match: float
    reference_exact_match: float
    num_lost: int
    num_gained: int
    flips: float
    vision_cosine_p1: float | None = None


@dataclass(frozen=True)
class RowReport:
    """One row in one group; `error` in place of figures where it could not be made."""

    name: str
    group: str
    size: int | None = None  # bytes of the variant's files
    seconds: float | None = None  # to make it from the float package
    quality: Quality | None = None
    tokens_per_second: float | None = None  # of the decoder alone, a token at a time behind a prompt with an image
    max_abs_logits: float | None = None  # of a round trip: against what the maker itself computes
    kl_calibration: float | None = None  # of chosen bits, on the samples they were chosen by
    kl_promised: float | None = None  # and the bound for others
    error: str | None = None


@dataclass(frozen=True)
class QuantReport:
    schema: str
    date: str
    box: dict[str, str]
    num_items: int
    num_samples: int
    groups: tuple[Group, ...]
    rows: tuple[RowReport, ...]


def text(report: QuantReport) -> str:
    """One table a group, for a terminal."""
    parts: list[str] = []
    for group in report.groups:
        rows = [_cells(row) for row in report.rows if row.group == group.name]
        parts.append(f"{group.about}, {report.num_items} questions\n{table(_HEADER, rows, _ALIGN)}")
        parts += _promises(report, group)
    return "\n\n".join(parts)


def markdown(report: QuantReport) -> str:
    """The same for a document."""
    parts: list[str] = []
    for group in report.groups:
        rows = [_cells(row) for row in report.rows if row.group == group.name]
        sides = "|".join("---" if side == "<" else "---:" for side in _ALIGN)
        lines = [_line(_HEADER), f"|{sides}|", *(_line(row) for row in rows)]
        parts.append(f"{group.about.capitalize()}:\n\n" + "\n".join(lines))
        parts += _promises(report, group)
    box = ", ".join(f"{name} {value}" for name, value in report.box.items())
    about = f"{report.date}, {report.num_items} held-out questions, {report.num_samples} calibration pairs; {box}."
    return "\n\n".join((*parts, about)) + "\n"


def _promises(report: QuantReport, group: Group) -> list[str]:
    """A list of what was promised of bits chosen by measured losses, and what came of it; nothing without such rows."""
    lines = [
        f"- {row.name}: mean KL {row.kl_calibration:.2e} on its calibration pairs, at most {row.kl_promised:.2e} "
        f"promised, {row.quality.kl_mean:.2e} on the questions: "
        f"{'kept' if row.quality.kl_mean <= row.kl_promised else 'broken'}"
        for row in report.rows
        if row.group == group.name and row.quality and row.kl_promised is not None and row.kl_calibration is not None
    ]
    return ["\n".join(lines)] if lines else []


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: RowReport) -> tuple[str, ...]:
    quality = row.quality
    if quality is None:
        return (row.name, f"not made: {row.error}", *[""] * (len(_HEADER) - 2))
    return (
        row.name,
        "-" if row.size is None else f"{row.size:,}",
        f"{quality.kl_mean:.3g}",
        f"{quality.kl_p999:.3g}",
        f"{quality.same_top1:.2%}",
        f"{quality.exact_match:.1%}",
        str(quality.num_lost),
        str(quality.num_gained),
        f"{quality.flips:.1%}",
        "-" if quality.vision_cosine_p1 is None else f"{quality.vision_cosine_p1:.5f}",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
        "-" if row.seconds is None else f"{row.seconds:.0f} s",
    )
