"""The one table of thresholds, and the judgement of measured numbers by it: PASS, FAIL or AMBIGUOUS.

A gate is a limit on one metric of one stage at one precision. Where nothing was compared, or a number is not finite,
the gate fails: missing evidence is never a pass. AMBIGUOUS says that only near ties of the reference stand between the
number and the limit; it does not fail a run. Each result records the limit that would have passed.

Precisions are columns: a stage is judged by the column of the graphs that it went through. `fp32-unit` is float32 on
activations of unit scale (golden cases), where absolute limits mean something.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from ..runtime.errors import InputError

__all__ = [
    "COLUMNS",
    "DEFAULT_GATES",
    "GATES_SCHEMA",
    "STAGES",
    "Gate",
    "GateResult",
    "GateTable",
    "Outcome",
    "column_of",
    "judge",
    "load_gates",
    "worst",
]

Outcome = Literal["PASS", "FAIL", "AMBIGUOUS"]
GATES_SCHEMA = "vlmport-gates/1"
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
)

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
    }
)
_AT_MOST = frozenset(
    {
        "max_abs",
        "mean_abs",
        "relative_l2",
        "num_nonfinite",
        "num_different",
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


@dataclass(frozen=True)
class GateTable:
    """Gates by column, then by kind of stage; and by column the margin in nats up to which a flip is a near tie."""

    gates: Mapping[str, Mapping[str, tuple[Gate, ...]]]
    tie_margin: Mapping[str, float]
    origin: str


_ISSUE = "requirement of golden cases: unit scale, all ids equal"
_FINITE = Gate("num_nonfinite", 0, "NaN and infinity are never right")
_EXACT = (Gate("num_different", 0, "prompts, grids and positions are integer work"),)
_PIXELS = (Gate("max_abs", 1e-6, "float32 rescaling and normalising, fused or not: 5e-7 apart"),)
_UNIT = (_FINITE, Gate("max_abs", 1e-4, _ISSUE))
_LOGITS_UNIT = (*_UNIT, Gate("same_top1", 1.0, _ISSUE))
_TOWER_FP32 = (
    _FINITE,
    Gate("cosine_min", 0.99999, "proposal: float32 noise"),
    Gate("relative_l2", 1e-4, "proposal: float32 noise"),
)
_LOGITS_FP32 = (
    _FINITE,
    Gate("max_abs", 4e-3, "optimum-intel: logits of tiny models in float32"),
    Gate("same_top1", 1.0, "proposal: equal off ties"),
)
_TOWER_FP16 = (
    _FINITE,
    Gate("cosine_min", 0.999, "proposal"),
    Gate("relative_l2", 1e-2, "proposal: stands for twice the self-noise of float16"),
)
_LOGITS_FP16 = (
    _FINITE,
    Gate("kl_mean", 1e-4, "proposal: stands for twice the self-noise of float16"),
    Gate("same_top1", 0.995, "proposal"),
)
_TOWER_LOW = (_FINITE, Gate("cosine_p1", 0.99, "Polygraphy"), Gate("snr_db", 20.0, "Polygraphy"))
_LOGITS_INT8 = (
    _FINITE,
    Gate("kl_mean", 1e-3, "proposal; llama.cpp Q8_0 0.0002"),
    Gate("kl_p999", 0.05, "proposal; llama.cpp Q8_0 0.006"),
    Gate("same_top1", 0.99, "proposal; llama.cpp Q8_0 99.2 %"),
)
_LOGITS_INT4 = (
    _FINITE,
    Gate("kl_mean", 0.02, "proposal; llama.cpp Q5_K_M 0.005, Q3_K_M 0.05"),
    Gate("kl_p999", 0.5, "proposal; llama.cpp Q5_K_M 0.12, Q3_K_M 1.5"),
    Gate("same_top1", 0.95, "proposal; llama.cpp Q5_K_M 96.5 %, Q3_K_M 89.6 %"),
)
# With and without cache the same graphs run: only kernels and the order of sums differ.
_CACHE_FP32 = (_FINITE, Gate("max_abs", 1e-4, "proposal: against the run without cache"))
_CACHE_FP16 = (_FINITE, Gate("kl_mean", 1e-4, "as prefill"))
_CACHE_INT8 = (_FINITE, Gate("kl_mean", 1e-3, "as prefill"))
_CACHE_INT4 = (_FINITE, Gate("kl_mean", 0.02, "as prefill"))
_NO_SLOPE = Gate("drift_slope", 1e-5, "proposal: errors do not grow over decode steps")

DEFAULT_GATES = GateTable(
    gates=MappingProxyType(
        {
            "fp32-unit": {
                "exact": _EXACT,
                "pixels": _PIXELS,
                "vision": _UNIT,
                "projector": _UNIT,
                "embeddings": _UNIT,
                "past": _UNIT,
                "prompt": _LOGITS_UNIT,
                "prefill": _LOGITS_UNIT,
                "argmax": (Gate("match", 1.0, _ISSUE),),
                "decode": _LOGITS_UNIT,
                "classes": _LOGITS_UNIT,
                "cache": _UNIT,
                "generation": (Gate("match", 1.0, _ISSUE),),
            },
            "fp32": {
                "exact": _EXACT,
                "pixels": _PIXELS,
                "vision": _TOWER_FP32,
                "projector": _TOWER_FP32,
                "embeddings": _TOWER_FP32,
                "past": _TOWER_FP32,
                "argmax": (Gate("match", 1.0, "as same_top1 of prefill"),),
                "prompt": _LOGITS_FP32,
                "prefill": _LOGITS_FP32,
                "decode": (*_LOGITS_FP32, _NO_SLOPE),
                "classes": _LOGITS_FP32,
                "cache": _CACHE_FP32,
                "generation": (Gate("match", 1.0, "equal off ties"),),
                "task": (Gate("changed", 0.0, "float32 answers as the reference does"),),
            },
            "fp16": {
                "exact": _EXACT,
                "pixels": _PIXELS,
                "vision": _TOWER_FP16,
                "projector": _TOWER_FP16,
                "embeddings": _TOWER_FP16,
                "past": _TOWER_FP16,
                "argmax": (Gate("match", 0.995, "as same_top1 of prefill"),),
                "prefill": _LOGITS_FP16,
                "decode": _LOGITS_FP16,
                "classes": _LOGITS_FP16,
                "cache": _CACHE_FP16,
                "generation": (Gate("match", 0.9, "proposal: tie-adjusted, over many prompts"),),
                "task": (Gate("recovery", 0.99, "llm-compressor 0.95; proposal 0.99"),),
            },
            "int8": {
                "exact": _EXACT,
                "pixels": _PIXELS,
                "vision": _TOWER_LOW,
                "projector": _TOWER_LOW,
                "embeddings": _TOWER_LOW,
                "past": _TOWER_LOW,
                "prefill": _LOGITS_INT8,
                "argmax": (Gate("match", 0.99, "as same_top1 of prefill"),),
                "decode": _LOGITS_INT8,
                "classes": _LOGITS_INT8,
                "cache": _CACHE_INT8,
                "task": (Gate("recovery", 0.99, "proposal"), Gate("flips", 0.01, "at most 1 % in either direction")),
            },
            "int4": {
                "exact": _EXACT,
                "pixels": _PIXELS,
                "vision": _TOWER_LOW,
                "projector": _TOWER_LOW,
                "embeddings": _TOWER_LOW,
                "prefill": _LOGITS_INT4,
                "argmax": (Gate("match", 0.95, "as same_top1 of prefill"),),
                "decode": _LOGITS_INT4,
                "classes": _LOGITS_INT4,
                "cache": _CACHE_INT4,
                "task": (Gate("recovery", 0.95, "llm-compressor; proposal"),),
            },
        }
    ),
    # Two choices change places only when they move against each other by the reference's margin. So a margin counts as
    # a tie up to twice the noise that the column allows: 2 x max abs in float32, else 2 x sqrt(2 x mean KL), because a
    # logit error of variance v gives a divergence of about v / 2.
    tie_margin=MappingProxyType({"fp32-unit": 2e-4, "fp32": 8e-3, "fp16": 0.03, "int8": 0.09, "int4": 0.4}),
    origin="built in",
)

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


def load_gates(file: Path, base: GateTable = DEFAULT_GATES) -> GateTable:
    """The base table with the limits that a JSON file replaces, adds or (null) removes.

        {"schema": "vlmport-gates/1", "gates": {"int8": {"prefill": {"kl_mean": 0.01, "kl_p999": null}}},
         "tie_margin": {"int8": 0.1}}

    Raises InputError naming the unknown column, stage or metric, or the value that is no number.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such gates file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    _known(file, "", data, {"schema", "gates", "tie_margin"})
    if data.get("schema") != GATES_SCHEMA:
        raise InputError(f"{file}: schema is {data.get('schema')!r}; it must be {GATES_SCHEMA!r}")
    gates = {column: dict(stages) for column, stages in base.gates.items()}
    for column, stages in _known(file, "gates", data.get("gates", {}), set(COLUMNS)).items():
        for stage, limits in _known(file, f"gates.{column}", stages, set(STAGES)).items():
            where = f"gates.{column}.{stage}"
            changed = {gate.metric: gate for gate in gates[column].get(stage, ())}
            for metric, limit in _known(file, where, limits, set(_AT_LEAST | _AT_MOST)).items():
                changed.pop(metric, None)
                if limit is not None:
                    changed[metric] = Gate(metric, _number(file, f"{where}.{metric}", limit), str(file))
            gates[column][stage] = tuple(changed.values())
    margins = _known(file, "tie_margin", data.get("tie_margin", {}), set(COLUMNS))
    numbers = {column: _number(file, f"tie_margin.{column}", value) for column, value in margins.items()}
    return GateTable(gates, {**base.tie_margin, **numbers}, origin=str(file))


def _judge_one(gate: Gate, column: str, stage: str, values: Mapping[str, float]) -> GateResult:
    value = values.get(gate.metric, math.nan)
    outcome: Outcome = "PASS" if gate.holds(value) else "FAIL"
    if outcome == "FAIL" and not math.isnan(value) and gate.metric in _FORGIVING:
        outcome = "AMBIGUOUS" if gate.holds(values.get(_FORGIVING[gate.metric], math.nan)) else "FAIL"
    measured = None if math.isnan(value) else value
    would_pass = measured if measured is not None and math.isfinite(measured) else None
    return GateResult(stage, column, gate.metric, gate.limit, measured, outcome, would_pass)


def _known(file: Path, where: str, data: Any, names: set[str]) -> dict[str, Any]:
    place = f"{file}: {where}" if where else str(file)
    if not isinstance(data, dict):
        raise InputError(f"{place}: expected an object, got {str(data)[:60]!r}")
    fields = cast("dict[str, Any]", data)
    unknown = sorted(set(fields) - names)
    if unknown:
        raise InputError(f"{place}: unknown {unknown[0]!r}; known are {', '.join(sorted(names))}")
    return fields


def _number(file: Path, where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{file}: {where}: expected a number, got {str(value)[:60]!r}")
    return float(value)
