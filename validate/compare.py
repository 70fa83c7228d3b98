"""Comparison records: one stage of one sample, and the row of the report that several make.

A record holds errors, not tensors, so that a run over many samples stays small. A row joins the records of one stage
and is judged by the gates of its kind. What cannot be compared is a record too, with its reason: nothing is dropped.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.manifest import Variant
from .gates import STAGES, GateResult, GateTable, Outcome, column_of, judge, worst
from .metrics import LogitErrors, TensorErrors, drift_slope, logit_errors, margins, tensor_errors
from .statistics import summarize_kl

__all__ = [
    "Choices",
    "Comparison",
    "NotCompared",
    "StageRow",
    "compare_generation",
    "compare_ids",
    "compare_logits",
    "compare_tensors",
    "stage_columns",
    "stage_rows",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class Choices:
    """Discrete choices: are they the reference's, and if not, was the reference near a tie there."""

    same: NDArray[np.bool_]
    tie: NDArray[np.bool_]


@dataclass(frozen=True)
class Comparison:
    """One stage of one sample. `kind` names its gates (gates.STAGES)."""

    sample: str
    stage: str
    kind: str
    tensor: TensorErrors | None = None
    logits: LogitErrors | None = None
    num_values: int = 0  # integers compared
    num_different: int = 0
    choices: Choices | None = None
    note: str = ""

    @property
    def badness(self) -> float:
        """Larger is worse, within one stage; finds the sample to show."""
        if self.logits is not None and self.logits.kl.size:
            return float(self.logits.kl.max())
        return self.tensor.max_abs if self.tensor is not None else float(self.num_different)


@dataclass(frozen=True)
class NotCompared:
    """A stage that one side has and the other has not, or that means something else there."""

    sample: str
    stage: str
    reason: str


@dataclass(frozen=True)
class StageRow:
    """All records of one stage, judged. `values` has every metric that could be computed."""

    stage: str
    kind: str
    column: str  # of the gate table
    num_samples: int
    values: Mapping[str, float]
    worst_sample: str
    gates: tuple[GateResult, ...]
    notes: tuple[str, ...]

    @property
    def outcome(self) -> Outcome | None:
        """None where the column has no gate for this kind: reported, not judged."""
        return worst(gate.outcome for gate in self.gates)


def compare_tensors(sample: str, stage: str, kind: str, reference: Array, candidate: Array) -> Comparison:
    """Float tensors of any shape. Unequal shapes are an infinite error that says both."""
    if reference.shape == candidate.shape:
        return Comparison(sample, stage, kind, tensor=tensor_errors(reference, candidate))
    return Comparison(sample, stage, kind, tensor=_mismatch(reference), note=_shapes(reference, candidate))


def compare_logits(sample: str, stage: str, kind: str, reference: Array, candidate: Array) -> Comparison:
    """Next-token logits, [N, V] or [V] on both sides."""
    if reference.shape != candidate.shape:
        return Comparison(sample, stage, kind, tensor=_mismatch(reference), note=_shapes(reference, candidate))
    reference_NV, candidate_NV = np.atleast_2d(reference), np.atleast_2d(candidate)
    return Comparison(
        sample,
        stage,
        kind,
        tensor=tensor_errors(reference_NV, candidate_NV),
        logits=logit_errors(reference_NV, candidate_NV),
    )


def compare_ids(sample: str, stage: str, reference: Array, candidate: Array, kind: str = "exact") -> Comparison:
    """Integer tensors: how many values differ. Of unequal shapes, all do."""
    if reference.shape != candidate.shape:
        note = _shapes(reference, candidate)
        count = max(reference.size, 1)
        return Comparison(sample, stage, kind, num_values=count, num_different=count, note=note)
    different = int((reference != candidate).sum())
    return Comparison(sample, stage, kind, num_values=reference.size, num_different=different)


def compare_generation(
    sample: str, reference: Sequence[int], candidate: Sequence[int], step_logits: Array | None, tie_margin: float
) -> Comparison:
    """Free-running greedy ids. Where they part first decides: a near tie of the reference there, or an error.

    step_logits: the reference's [N, V], None where it has none (then nothing counts as a tie).
    """
    length = max(len(reference), len(candidate))
    differs = [list(reference[i : i + 1]) != list(candidate[i : i + 1]) for i in range(length)]
    first = differs.index(True) if any(differs) else None
    tie, note = False, ""
    if first is not None:
        note = f"{length - sum(differs)} of {length} ids equal, first other id at step {first}"
        if step_logits is not None and first < len(step_logits):
            margin = float(margins(step_logits[first]))
            tie = margin <= tie_margin
            note += f", where the reference's margin is {margin:.4f} ({'a near tie' if tie else 'not a tie'})"
    choices = Choices(np.array([first is None]), np.array([tie]))
    return Comparison(
        sample,
        "generated_ids",
        "generation",
        num_values=length,
        num_different=sum(differs),
        choices=choices,
        note=note,
    )


def stage_columns(*variants: Variant) -> dict[str, str]:
    """Kind of stage -> column of the gate table, from the graphs that the stage has gone through, on both sides.

    Two variants where the reference is one too: its noise counts as much.
    """
    labels = [(role, graph.precision) for variant in variants for role, graph in variant.graphs.items()]
    tower = [label for role, label in labels if role == "vision_encoder"]
    features = [label for role, label in labels if role in ("vision_encoder", "projector", "patch_embed")]
    embedded = [*features, *(label for role, label in labels if role == "embed_tokens")]
    everything = column_of(label for _, label in labels)
    columns = dict.fromkeys(
        ("past", "prompt", "prefill", "argmax", "decode", "cache", "classes", "generation", "task", "sweep"), everything
    )
    columns |= {"exact": everything, "pixels": everything}  # preprocessing is the same in all columns
    columns |= {"vision": column_of(tower), "projector": column_of(features), "embeddings": column_of(embedded)}
    return columns


def stage_rows(records: Iterable[Comparison], table: GateTable, columns: Mapping[str, str]) -> tuple[StageRow, ...]:
    """One row a stage, kinds in the order of gates.STAGES, which is that of a request, stages as they first appear."""
    by_stage: dict[tuple[str, str], list[Comparison]] = {}
    for record in records:
        by_stage.setdefault((record.stage, record.kind), []).append(record)
    ordered = sorted(by_stage.items(), key=lambda item: STAGES.index(item[0][1]))
    return tuple(_row(stage, kind, found, table, columns[kind]) for (stage, kind), found in ordered)


def _row(stage: str, kind: str, records: Sequence[Comparison], table: GateTable, column: str) -> StageRow:
    values = _values(records, table.tie_margin[column], kind)
    return StageRow(
        stage=stage,
        kind=kind,
        column=column,
        num_samples=len({record.sample for record in records}),
        values=values,
        worst_sample=max(records, key=lambda record: record.badness).sample,
        gates=judge(table, column, kind, stage, values),
        notes=tuple(dict.fromkeys(f"{record.sample}: {record.note}" for record in records if record.note)),
    )


def _values(records: Sequence[Comparison], tie_margin: float, kind: str) -> dict[str, float]:
    values: dict[str, float] = {}
    if tensors := [record.tensor for record in records if record.tensor is not None]:
        metrics = dataclasses.asdict(TensorErrors.join(tensors).metrics())
        values |= {**metrics, "num_nonfinite": metrics["num_nan"] + metrics["num_inf"]}
    if logits := [record.logits for record in records if record.logits is not None]:
        values |= _logit_values(logits, tie_margin)
        if kind == "decode":
            values["drift_slope"] = drift_slope([errors.kl for errors in logits])
    if num_values := sum(record.num_values for record in records):
        values |= {"num_values": num_values, "num_different": sum(record.num_different for record in records)}
    if choices := [record.choices for record in records if record.choices is not None]:
        same = np.concatenate([choice.same for choice in choices])
        tie = np.concatenate([choice.tie for choice in choices])
        values |= {"match": float(same.mean()), "match_off_ties": float((same | tie).mean())}
    return values


def _logit_values(parts: Sequence[LogitErrors], tie_margin: float) -> dict[str, float]:
    """Names as gates have them. A flip where the reference's margin is at most `tie_margin` nats is a tie's."""
    told = summarize_kl(parts)
    errors = LogitErrors.join(parts)
    ties_N = ~errors.same & (errors.margin <= tie_margin)
    names = ("mean", "median", "p99", "p999", "max", "stderr", "ci_low", "ci_high")
    return {
        "num_positions": told.num_positions,
        **{f"kl_{name}": getattr(told, name) for name in names},
        "same_top1": told.same_top1,
        "same_top1_off_ties": float((errors.same | ties_N).mean()) if errors.same.size else math.nan,
        "num_ties_flipped": int(ties_N.sum()),
        "top5_containment": told.top5,
        "delta_p_rms": told.delta_p_rms,
    }


def _mismatch(reference: Array) -> TensorErrors:
    return TensorErrors(max(reference.size, 1), math.inf, math.inf, math.inf, 0.0, 0, 0, np.full(1, -1.0))


def _shapes(reference: Array, candidate: Array) -> str:
    return f"shape {list(candidate.shape)}, the reference has {list(reference.shape)}"
