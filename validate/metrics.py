"""How far a candidate is from a reference: numbers only, no judgement (that is gates.py).

Dims: R rows (all leading axes flattened), C columns (the last axis), N positions, V vocabulary.
Sums run in float64 whatever the inputs are. Errors of several samples are joined row by row, so that a percentile over
a whole run is a true percentile. Logarithms are natural: divergences and margins are in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LogitErrors",
    "TensorErrors",
    "TensorMetrics",
    "drift_slope",
    "log_softmax",
    "logit_errors",
    "margins",
    "tensor_errors",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
_BLOCK = 1 << 22  # elements handled at a time: 32 MiB in float64


@dataclass(frozen=True)
class TensorMetrics:
    """Differences of two tensors of equal shape. NaN where nothing finite was there to compare."""

    count: int  # compared elements
    max_abs: float = math.nan
    mean_abs: float = math.nan
    relative_l2: float = math.nan  # |candidate - reference| / |reference|
    cosine_min: float = math.nan  # over rows
    cosine_p1: float = math.nan
    cosine_mean: float = math.nan
    snr_db: float = math.nan  # 20 log10(|reference| / |error|); inf for equal tensors
    num_nan: int = 0  # in the candidate
    num_inf: int = 0  # in the candidate


@dataclass(frozen=True)
class TensorErrors:
    """What TensorMetrics are computed from; `join` adds up several."""

    count: int
    max_abs: float
    sum_abs: float
    sum_error2: float
    sum_reference2: float
    num_nan: int
    num_inf: int
    cosine: Float64

    @classmethod
    def join(cls, parts: Sequence["TensorErrors"]) -> "TensorErrors":
        """One TensorErrors over the rows of all parts (at least one)."""
        return cls(
            count=sum(part.count for part in parts),
            max_abs=float(np.max([part.max_abs for part in parts])),
            sum_abs=sum(part.sum_abs for part in parts),
            sum_error2=sum(part.sum_error2 for part in parts),
            sum_reference2=sum(part.sum_reference2 for part in parts),
            num_nan=sum(part.num_nan for part in parts),
            num_inf=sum(part.num_inf for part in parts),
            cosine=np.concatenate([part.cosine for part in parts]),
        )

    def metrics(self) -> TensorMetrics:
        """The numbers of the report. An empty comparison has NaN everywhere: no gate can pass on it."""
        if self.count == 0:
            return TensorMetrics(count=0)
        error, reference = math.sqrt(self.sum_error2), math.sqrt(self.sum_reference2)
        return TensorMetrics(
            count=self.count,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.count,
            relative_l2=_ratio(error, reference),
            cosine_min=float(self.cosine.min()),
            cosine_p1=float(np.quantile(self.cosine, 0.01)),
            cosine_mean=float(self.cosine.mean()),
            snr_db=_decibels(reference, error),
            num_nan=self.num_nan,
            num_inf=self.num_inf,
        )


@dataclass(frozen=True)
class LogitErrors:
    """A value a position; statistics.summarize_kl makes the numbers of a report of them, `join` one of several."""

    kl: Float64
    same: NDArray[np.bool_]
    margin: Float64  # reference, first minus second choice
    top5: NDArray[np.bool_]
    delta_p: Float64

    @classmethod
    def join(cls, parts: Sequence["LogitErrors"]) -> "LogitErrors":
        """One LogitErrors over the positions of all parts (at least one)."""
        names = ("kl", "same", "margin", "top5", "delta_p")
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def tensor_errors(reference: Array, candidate: Array) -> TensorErrors:
    """Errors of `candidate` against `reference`, equal shapes, any numeric dtype. A scalar is one row of one column.

    NaN or infinity in the candidate makes max_abs infinite and the row's cosine -1: it can pass no gate.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, candidate {candidate.shape}")
    columns = reference.shape[-1] if reference.ndim else 1
    reference_RC, candidate_RC = reference.reshape(-1, max(columns, 1)), candidate.reshape(-1, max(columns, 1))
    step = max(1, _BLOCK // max(columns, 1))
    parts = [
        _block_errors(reference_RC[start : start + step], candidate_RC[start : start + step])
        for start in range(0, len(reference_RC), step)
    ]
    empty = TensorErrors(0, 0.0, 0.0, 0.0, 0.0, 0, 0, np.zeros(0))
    return TensorErrors.join(parts) if parts else empty


def logit_errors(reference_NV: Array, candidate_NV: Array) -> LogitErrors:
    """Errors of next-token logits, both [N, V]. A position with NaN or infinite logits has infinite divergence."""
    if reference_NV.ndim != 2 or reference_NV.shape != candidate_NV.shape:
        raise ValueError(f"shapes differ: reference {reference_NV.shape}, candidate {candidate_NV.shape}")
    step = max(1, _BLOCK // max(reference_NV.shape[1], 1))
    parts = [
        _block_logit_errors(reference_NV[start : start + step], candidate_NV[start : start + step])
        for start in range(0, len(reference_NV), step)
    ]
    empty = LogitErrors(np.zeros(0), np.zeros(0, bool), np.zeros(0), np.zeros(0, bool), np.zeros(0))
    return LogitErrors.join(parts) if parts else empty


def log_softmax(logits_NV: Array) -> Float64:
    """Log-probabilities in float64, stable for any finite logits."""
    shifted = logits_NV.astype(np.float64) - logits_NV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def margins(logits_NV: Array) -> Float64:
    """First minus second largest logit a row, which is also the difference of their log-probabilities. V >= 2."""
    top = np.partition(logits_NV.astype(np.float64), -2, axis=-1)[..., -2:]
    return top[..., 1] - top[..., 0]


def drift_slope(kl_by_step: Sequence[Array]) -> float:
    """Least-squares slope of the divergence over decode steps, in nats a step; one array [steps] a sample.

    Zero when no sample has two steps: there is nothing to drift.
    """
    steps = np.concatenate([np.arange(len(kl), dtype=np.float64) for kl in kl_by_step] or [np.zeros(0)])
    kl_N = np.concatenate([np.asarray(kl, dtype=np.float64) for kl in kl_by_step] or [np.zeros(0)])
    spread = steps - steps.mean() if steps.size else steps
    total = float(np.square(spread).sum())
    return float((spread * kl_N).sum() / total) if total > 0 else 0.0


def _block_errors(reference_RC: Array, candidate_RC: Array) -> TensorErrors:
    a_RC, b_RC = reference_RC.astype(np.float64), candidate_RC.astype(np.float64)
    num_nan, num_inf = int(np.isnan(b_RC).sum()), int(np.isinf(b_RC).sum())
    bad_R = ~np.all(np.isfinite(a_RC) & np.isfinite(b_RC), axis=1)
    a_RC, b_RC = np.where(bad_R[:, None], 0.0, a_RC), np.where(bad_R[:, None], 0.0, b_RC)
    error_RC = np.abs(b_RC - a_RC)
    bad = bool(bad_R.any())
    return TensorErrors(
        count=int(a_RC.size),
        max_abs=math.inf if bad else float(error_RC.max(initial=0.0)),
        sum_abs=math.inf if bad else float(error_RC.sum()),
        sum_error2=math.inf if bad else float(np.square(error_RC).sum()),
        sum_reference2=float(np.square(a_RC).sum()),
        num_nan=num_nan,
        num_inf=num_inf,
        cosine=np.where(bad_R, -1.0, _row_cosine(a_RC, b_RC)),
    )


def _row_cosine(a_RC: Float64, b_RC: Float64) -> Float64:
    """Cosine a row. Two zero rows agree (1), a zero row against another does not (0)."""
    a_R, b_R = np.linalg.norm(a_RC, axis=1), np.linalg.norm(b_RC, axis=1)
    both_zero_R, any_zero_R = (a_R == 0) & (b_R == 0), (a_R == 0) | (b_R == 0)
    a_R, b_R = np.where(any_zero_R, 1.0, a_R), np.where(any_zero_R, 1.0, b_R)
    cosine = np.clip(((a_RC / a_R[:, None]) * (b_RC / b_R[:, None])).sum(axis=1), -1.0, 1.0)
    equal_R = (a_RC == b_RC).all(axis=1)
    return np.where(both_zero_R | equal_R, 1.0, np.where(any_zero_R, 0.0, cosine))


def _block_logit_errors(reference_NV: Array, candidate_NV: Array) -> LogitErrors:
    bad_N = ~np.all(np.isfinite(reference_NV) & np.isfinite(candidate_NV), axis=1)
    a_NV, b_NV = (np.where(bad_N[:, None], 0.0, side.astype(np.float64)) for side in (reference_NV, candidate_NV))
    log_a_NV, log_b_NV = log_softmax(a_NV), log_softmax(b_NV)
    p_a_NV = np.exp(log_a_NV)
    kl_N = np.maximum((p_a_NV * (log_a_NV - log_b_NV)).sum(axis=1), 0.0)  # rounding may go 1e-17 below zero
    rows_N = np.arange(len(a_NV))
    top_a_N, top_b_N = a_NV.argmax(axis=1), b_NV.argmax(axis=1)
    delta_p_N = np.exp(log_b_NV[rows_N, top_a_N]) - p_a_NV[rows_N, top_a_N]
    return LogitErrors(
        kl=np.where(bad_N, math.inf, kl_N),
        same=(top_a_N == top_b_N) & ~bad_N,
        margin=np.where(bad_N, math.inf, margins(a_NV)),
        top5=_among_top(b_NV, top_a_N) & _among_top(a_NV, top_b_N) & ~bad_N,
        delta_p=np.where(bad_N, 1.0, delta_p_N),
    )


def _among_top(logits_NV: Float64, choice_N: NDArray[np.int64], num: int = 5) -> NDArray[np.bool_]:
    chosen_N = np.take_along_axis(logits_NV, choice_N[:, None], axis=1)
    return (logits_NV > chosen_N).sum(axis=1) < num


def _ratio(error: float, reference: float) -> float:
    if error == 0:
        return 0.0
    return error / reference if reference > 0 else math.inf


def _decibels(reference: float, error: float) -> float:
    if error == 0:
        return math.inf
    return 20 * math.log10(reference / error) if reference > 0 and math.isfinite(error) else -math.inf
