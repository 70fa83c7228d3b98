"""How report.html writes what the JSON holds: numbers, intervals, shares; and the parts that a page is made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

__all__ = [
    "Document",
    "ExampleCard",
    "Section",
    "Table",
    "cell",
    "interval",
    "kl_of",
    "names",
    "number",
    "ratio",
    "share",
]

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = ()  # columns of words, set to the left
    folded: bool = False


@dataclass(frozen=True)
class ExampleCard:
    title: str
    about: str
    picture: str  # data URI, or empty
    alt: str
    answers: tuple[tuple[str, Markup], ...]


@dataclass(frozen=True)
class Section:
    """One heading of the page: why it is there, a chart, tables, examples; each of them may be missing."""

    id: str
    title: str
    about: str
    svg: Markup | None = None
    caption: str = ""
    tables: tuple[Table, ...] = ()
    examples: tuple[ExampleCard, ...] = ()


def kl_of(variant: Document) -> Document | None:
    return (variant.get("statistics") or {}).get("kl")


def names(document: Document) -> list[str]:
    return [variant["name"] for variant in document["variants"]]


def number(value: Any) -> float:
    """A number of the JSON; "nan", "inf" and null too."""
    return math.nan if value is None else float(value)


def cell(value: Any) -> str:
    found = number(value)
    return "not measured" if math.isnan(found) else f"{found:.4g}"


def interval(value: Any, low: Any, high: Any, spec: str) -> str:
    text = format(number(value), spec)
    return text if math.isnan(number(low)) else f"{text} [{number(low):{spec}}, {number(high):{spec}}]"


def ratio(found: Document) -> str:
    return share(found, found["value"])


def share(found: Document | None, value: Any) -> str:
    if value is None:
        return ""
    if not found or math.isnan(number(found["ci_low"])):
        return f"{number(value):.1%}"
    return f"{number(value):.1%} [{number(found['ci_low']):.1%}, {number(found['ci_high']):.1%}]"
