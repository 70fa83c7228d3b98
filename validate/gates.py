"""The one table of thresholds (gates.toml), and the judgement of numbers by it: PASS, FAIL or AMBIGUOUS.

A gate is a limit on one metric of one stage at one precision. Where nothing was compared, or a number is not finite,
the gate fails: missing evidence is never a pass. AMBIGUOUS does not fail a run: it says that only near ties of the
reference stand between the number and the limit. Of a share of a task's items the 95 % interval is recorded too, for
the reader alone: a number beyond its limit fails even where the interval reaches back over it, as more items may show
that it holds, and these do not. Each result records the limit that would have passed.

Precisions are columns: a stage is judged by the column of the graphs that it went through. `fp32-unit` is float32 on
activations of unit scale (golden cases), where absolute limits mean something.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from ..runtime.errors import InputError

__all__ = [
    "COLUMNS",
    "GATES_SCHEMA",
    "INPUT_KINDS",
    "STAGES",
    "Gate",
    "GateResult",
    "GateTable",
    "Outcome",
    "column_of",
    "default_gates",
    "judge",
    "load_gates",
    "worst",
]

Outcome = Literal["PASS", "FAIL", "AMBIGUOUS"]
GATES_SCHEMA = "vlmport-gates/2"
_DEFAULTS = Path(__file__).with_name("gates.toml")
COLUMNS = ("fp32-unit", "fp32", "fp16", "int8", "int4")  # from the strictest to the loosest

# Kinds of stages that have gates of their own. What a column has no gates for is reported, not judged.
STAGES = (
    "exact",
    "pixels",
    "vision",
    "projector",
    "embeddings",
    "past",
    "prompt",  # logits at every position of a prompt, placeholders included
    "prefill",  # logits at positions that an answer comes from
    "argmax",
    "decode",
    "cache",
    "classes",  # class scores of images
    "generation",
    "task",
    "sweep",  # inputs that bite
)
INPUT_KINDS = frozenset({"exact", "pixels"})  # what graphs are given: says nothing of what they compute

_AT_LEAST = frozenset(
    {
        "cosine_min",
        "cosine_p1",
        "cosine_mean",
        "snr_db",
        "same_top1",
        "same_top1_off_ties",
        "top5_containment",
        "match",
        "match_off_ties",
        "recovery",
        "num_items",
    }
)
_AT_MOST = frozenset(
    {
        "max_abs",
        "mean_abs",
        "relative_l2",
        "num_nonfinite",
        "num_different",
        "num_failed",
        "kl_mean",
        "kl_median",
        "kl_p99",
        "kl_p999",
        "kl_max",
        "delta_p_rms",
        "drift_slope",
        "flips",
        "changed",
    }
)
# What is told of few items only, with its interval: <metric>_ci_low and <metric>_ci_high among the values.
_SAMPLED = frozenset({"recovery", "flips"})
# A share that near ties may lower, and the same share with ties forgiven.
_FORGIVING = {"same_top1": "same_top1_off_ties", "match": "match_off_ties"}


@dataclass(frozen=True)
class Gate:
    """`metric` must not cross `limit`. `source` says where the limit comes from."""

    metric: str
    limit: float
    source: str

    def holds(self, value: float) -> bool:
        """NaN holds nowhere."""
        return value >= self.limit if self.metric in _AT_LEAST else value <= self.limit


@dataclass(frozen=True)
class GateResult:
    """One judged number."""

    stage: str
    column: str
    metric: str
    limit: float
    value: float | None  # None where it was not measured
    outcome: Outcome
    would_pass: float | None  # the limit that this value would have met; None where no limit could
    interval: tuple[float, float] | None = None  # 95 % of what is told of a sample


@dataclass(frozen=True)
class GateTable:
    """Gates by column, then by kind of stage; and by column the margin in nats up to which a flip is a near tie."""

    gates: Mapping[str, Mapping[str, tuple[Gate, ...]]]
    tie_margin: Mapping[str, float]
    origin: str


_LABELS = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4", "nf4": "int4"}


def column_of(labels: Iterable[str]) -> str:
    """The loosest column among precision labels of graphs (`fp32`, `int8-dynamic`, `int4-mixed`, ...).

    A label that starts like none of the columns is judged as float32: what is unknown gets no allowance.
    """
    columns = [next((to for start, to in _LABELS.items() if label.startswith(start)), "fp32") for label in labels]
    return max(columns, key=COLUMNS.index, default="fp32")


def judge(table: GateTable, column: str, kind: str, stage: str, values: Mapping[str, float]) -> tuple[GateResult, ...]:
    """One result a gate of that kind of stage. A metric that was not measured, or is NaN, fails."""
    assert kind in STAGES, kind
    return tuple(_judge_one(gate, column, stage, values) for gate in table.gates[column].get(kind, ()))


def worst(outcomes: Iterable[Outcome]) -> Outcome | None:
    """FAIL before AMBIGUOUS before PASS; None where there is no outcome."""
    found = set(outcomes)
    return next((outcome for outcome in ("FAIL", "AMBIGUOUS", "PASS") if outcome in found), None)


@cache
def default_gates() -> GateTable:
    """The table that ships with vlmport, gates.toml beside this file."""
    table = _merged(_DEFAULTS, GateTable({column: {} for column in COLUMNS}, {}, "nothing"))
    return GateTable(table.gates, table.tie_margin, origin="built in")


def load_gates(file: Path) -> GateTable:
    """The default table with the limits that a TOML file of the same form replaces, adds or (false) removes.

        schema = "vlmport-gates/2"
        [int8.prefill]
        kl_mean = 0.01
        kl_p999 = false

    Raises InputError naming the unknown precision, stage or metric, or the value that is no number.
    """
    return _merged(file, default_gates())


def _merged(file: Path, base: GateTable) -> GateTable:
    data = _read(file)
    gates = {column: dict(stages) for column, stages in base.gates.items()}
    for column in COLUMNS:
        for stage, limits in _known(file, column, data.get(column, {}), set(STAGES)).items():
            where = f"{column}.{stage}"
            changed = {gate.metric: gate for gate in gates[column].get(stage, ())}
            for metric, limit in _known(file, where, limits, set(_AT_LEAST | _AT_MOST)).items():
                changed.pop(metric, None)
                if limit is not False:
                    changed[metric] = _gate(file, f"{where}.{metric}", metric, limit)
            gates[column][stage] = tuple(changed.values())
    margins = _known(file, "tie_margin", data.get("tie_margin", {}), set(COLUMNS))
    numbers = {column: _number(file, f"tie_margin.{column}", value) for column, value in margins.items()}
    return GateTable(gates, {**base.tie_margin, **numbers}, origin=str(file))


def _read(file: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such gates file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not TOML: {error}") from error
    _known(file, "", data, {"schema", "tie_margin", *COLUMNS})
    if data.get("schema") != GATES_SCHEMA:
        raise InputError(f"{file}: schema is {data.get('schema')!r}; it must be {GATES_SCHEMA!r}")
    return data


def _gate(file: Path, where: str, metric: str, limit: Any) -> Gate:
    """A number alone, or {limit, source}."""
    if not isinstance(limit, dict):
        return Gate(metric, _number(file, where, limit), str(file))
    fields = _known(file, where, cast("Any", limit), {"limit", "source"})
    source = fields.get("source", str(file))
    if not isinstance(source, str):
        raise InputError(f"{file}: {where}.source: expected a text, got {str(source)[:60]!r}")
    return Gate(metric, _number(file, f"{where}.limit", fields.get("limit")), source)


def _judge_one(gate: Gate, column: str, stage: str, values: Mapping[str, float]) -> GateResult:
    value = values.get(gate.metric, math.nan)
    outcome: Outcome = "PASS" if gate.holds(value) else "FAIL"
    if outcome == "FAIL" and not math.isnan(value) and gate.metric in _FORGIVING:
        outcome = "AMBIGUOUS" if gate.holds(values.get(_FORGIVING[gate.metric], math.nan)) else "FAIL"
    measured = None if math.isnan(value) else value
    would_pass = measured if measured is not None and math.isfinite(measured) else None
    interval = _interval(gate.metric, values)
    return GateResult(stage, column, gate.metric, gate.limit, measured, outcome, would_pass, interval)


def _interval(metric: str, values: Mapping[str, float]) -> tuple[float, float] | None:
    """None where the metric is of no sample, or its interval cannot be told."""
    ends = (values.get(f"{metric}_ci_low", math.nan), values.get(f"{metric}_ci_high", math.nan))
    return ends if metric in _SAMPLED and not any(map(math.isnan, ends)) else None


def _known(file: Path, where: str, data: Any, names: set[str]) -> dict[str, Any]:
    place = f"{file}: {where}" if where else str(file)
    if not isinstance(data, dict):
        raise InputError(f"{place}: expected a table, got {str(data)[:60]!r}")
    fields = cast("dict[str, Any]", data)
    unknown = sorted(set(fields) - names)
    if unknown:
        raise InputError(f"{place}: unknown {unknown[0]!r}; known are {', '.join(sorted(names))}")
    return fields


def _number(file: Path, where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{file}: {where}: expected a number, got {str(value)[:60]!r}")
    return float(value)
