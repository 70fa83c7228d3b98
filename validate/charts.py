"""The charts of report.html: matplotlib figures as SVG that takes its colours from the page and needs no script.

Each function takes plain numbers and returns one `<svg>` element. Colours are CSS variables of the page (`--ink`,
`--grid`, `--s1` to `--s8`), so one chart serves light, dark and print. Text stays text: it can be found and selected.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

__all__ = ["Bar", "Curve", "Dot", "bars", "curves", "dots"]

_WIDTH = 7.6  # inches at 72 points: the SVG's own width, which the page scales
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
# Colours that no chart uses otherwise, replaced by variables of the page after drawing.
_INK, _MUTED, _GRID, _SURFACE = "#010101", "#020202", "#030303", "#040404"
_SERIES = tuple(f"#0101{number:02x}" for number in range(0x10, 0x18))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _SURFACE: "var(--surface)",
    **{colour: f"var(--s{number})" for number, colour in enumerate(_SERIES, 1)},
}
_MANY_DECADES = 1e4  # beyond it minor ticks are a grey bar
_MARKERS = "osD^vPX*"  # a series is told by its marker and its dashes too, not by its colour alone
_DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2), (3, 1), (8, 3), (2, 2), (4, 1, 1, 1))
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlmport",  # the same report gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One line. Points that are not finite or not positive leave a gap. `low`, `high`: a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Bar:
    """One bar of `bars`, from 0 to `value`, with an interval where there is one."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Dot:
    """One point of `dots`; `note` stands beside its name."""

    name: str
    x: float
    y: float
    note: str = ""


def curves(
    title: str,
    lines: Sequence[Curve],
    *,
    order: Sequence[str],
    x_label: str,
    y_label: str,
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Lines over a common x axis, y logarithmic where values spread.

    order: all names of the page, so that each keeps its colour; ticks: places of x with names.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.2 if ticks else 3.1), layout="constrained")  # names need room
        axes = figure.subplots()
        for line in lines:
            style = order.index(line.name) % len(_SERIES)
            y = [value if math.isfinite(value) and value > 0 else math.nan for value in line.y]
            axes.plot(
                line.x,
                y,
                color=_SERIES[style],
                marker=_MARKERS[style],
                markersize=3.5,
                linewidth=1.6,
                dashes=_DASHES[style] or (None, None),
                label=line.name,
            )
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=_SERIES[style], alpha=0.15, linewidth=0)
        _log(axes, [value for line in lines for value in line.y])
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()), rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(lines), 6))
        return _svg(figure, title)


def bars(title: str, groups: Mapping[str, Sequence[Bar]], *, order: Sequence[str], x_label: str) -> str:
    """Horizontal bars, one panel a group, each to its own scale; the value stands at the end of each bar."""
    count = sum(len(group) for group in groups.values())
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * count + 0.3 * len(groups)), layout="constrained")
        panels = figure.subplots(
            len(groups), 1, squeeze=False, height_ratios=[len(group) + 0.6 for group in groups.values()]
        )[:, 0]
        for axes, (name, group) in zip(panels, groups.items(), strict=True):
            places = range(len(group))
            values = [bar.value if math.isfinite(bar.value) else 0.0 for bar in group]
            axes.barh(places, values, height=0.62, color=_SERIES[order.index(name) % len(_SERIES)])
            for place, bar in zip(places, group, strict=True):
                if math.isfinite(bar.low) and math.isfinite(bar.high):
                    axes.plot([bar.low, bar.high], [place, place], color=_INK, linewidth=1.2)
                end = max(0.0, bar.value, bar.high if math.isfinite(bar.high) else 0.0)
                text = f"{bar.value:.2g}" if math.isfinite(bar.value) else "not measured"
                axes.annotate(text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", color=_INK)
            axes.set_yticks(list(places), [bar.label for bar in group])
            axes.tick_params(axis="y", length=0)
            axes.invert_yaxis()
            axes.axvline(0, color=_MUTED, linewidth=0.8)
            axes.grid(axis="x")
            axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
            axes.margins(x=0.12)
            axes.spines["left"].set_visible(False)
        panels[-1].set_xlabel(x_label)
        return _svg(figure, title)


def dots(title: str, points: Sequence[Dot], *, order: Sequence[str], x_label: str, y_label: str) -> str:
    """Named points, y logarithmic where values spread. No point is told by colour alone: its name is beside it."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.1), layout="constrained")
        axes = figure.subplots()
        for point in points:
            style = order.index(point.name) % len(_SERIES)
            axes.plot(point.x, point.y, marker=_MARKERS[style], markersize=9, color=_SERIES[style], linestyle="none")
        _log(axes, [point.y for point in points])
        axes.margins(x=0.22, y=0.2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        _name(figure, axes, points)
        return _svg(figure, title)


def _name(figure: Figure, axes: Axes, points: Sequence[Dot]) -> None:
    """Names beside points, each where it covers no other: on the right, else on the left, else further up or down."""
    figure.draw_without_rendering()  # places are known from here on
    placed: list[Bbox] = []
    for point in points:
        text = f"{point.name}\n{point.note}" if point.note else point.name
        for x, y in ((9, 0), (-9, 0), (9, 24), (9, -24), (-9, 24), (-9, -24), (9, 48), (9, -48)):
            label = axes.annotate(
                text,
                (point.x, point.y),
                xytext=(x, y),
                textcoords="offset points",
                va="center",
                ha="left" if x > 0 else "right",
                fontsize=9,
            )
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                break
            label.remove()
        else:
            label = axes.annotate(text, (point.x, point.y), xytext=(9, 0), textcoords="offset points", fontsize=9)
            box = label.get_window_extent()
        placed.append(box)


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis where positive values lie more than a factor of five apart."""
    found = [value for value in values if math.isfinite(value) and value > 0]
    if found and max(found) / min(found) >= 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if max(found) / min(found) > _MANY_DECADES:
            axes.yaxis.set_minor_locator(NullLocator())


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page: scaled by its viewBox, named for screen readers, ids its own."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    prefix = re.sub(r"\W+", "-", title.lower()).strip("-")
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
        if (name := parent.get("id")) is not None:
            if name in used:
                parent.set("id", f"{prefix}-{name}")
            else:
                del parent.attrib["id"]
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", title)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
