"""Finds the first operator of a package that computes something else than the reference.

Both sides are tapped at the same points (points.py, reference_taps.py) on the same request. Each operator is judged
twice: by its value in the whole run (`accumulated`), and by what it gives when it is fed the reference's own values
(`own`). The second tells a wrong operator from one that is fed wrong values, so a fault is found where it is, and the
tolerance can be that of one operator: far below what adds up over a model.

Errors are relative L2: |candidate - reference| / |reference|. Where a recipe has moved channels of a norm into the
linears behind it, which gives the same function, the norm is compared and fed by its own scale; see `_moved_channels`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto

from .metrics import tensor_errors
from .pieces import PiecedGraph
from .points import REFERENCE_SUFFIX, Point, Segment, cut_at, find_points, layer_of, segments
from .reference_taps import TapStore

__all__ = ["OperatorError", "RoleRun", "judge_role", "relative_l2", "tolerance_of"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]

# By how an operator's weight is stored: relative L2 of one operator that is fed exact values. Measured on the demo and
# the golden checkpoints (docs/parity.md); float32 kernels differ in the order of sums alone.
_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "int8": 0.02, "int8-dynamic": 0.05, "int4": 0.2, "nf4": 0.2}
_ROUNDING = {"QuantizeTokens", "MatMulNBits"}  # what reads the input of a quantized linear


@dataclass(frozen=True)
class OperatorError:
    """One known value of a graph: what makes it, and how far it is from the reference."""

    role: str
    layer: int | None  # number of the block; None outside of blocks
    name: str  # module, or what lies between modules: "layers.0.self_attn.o_proj input"
    operators: tuple[str, ...]
    own: float
    accumulated: float
    tolerance: float  # of `own`
    phase: str = "prompt"  # or "step": one token through the cache
    snr_db: float = math.inf  # this and the rest: of the value in the whole run
    cosine_min: float = 1.0  # over rows
    max_abs: float = 0.0

    @property
    def outcome(self) -> str:
        return "PASS" if self.own <= self.tolerance else "FAIL"


@dataclass(frozen=True)
class RoleRun:
    """One graph and what it is fed: by the package itself, and what of it the reference has."""

    role: str
    graph: Path
    formats: Mapping[str, str]  # parameter -> how it is stored
    feeds: Mapping[str, Array]
    reference_feeds: Mapping[str, Array]  # in place of `feeds` where own errors are judged
    outputs: Mapping[str, Array]  # the reference's, float32; only those that it has
    modules: tuple[str, ...]
    norms: Mapping[str, Array]  # weights [K] of the reference's norms, by module
    phase: str = "prompt"


def judge_role(run: RoleRun, taps: TapStore, budget: int) -> tuple[tuple[OperatorError, ...], dict[str, Array]]:
    """Errors of every known value of a graph in its order, and the graph's outputs where it is fed the reference's."""
    model = onnx.load(run.graph, load_external_data=False)
    folder, outputs = run.graph.parent, [value.name for value in model.graph.output]
    given = {value.name for value in model.graph.input}
    points = find_points(model.graph, run.modules)
    keys = {p.value: (run.role, p.module, p.side) for p in reversed(points) if p.value not in given}
    keys = {value: key for value, key in keys.items() if key in taps}
    asked = [*dict.fromkeys([*keys, *outputs])]
    found = dict(zip(asked, PiecedGraph(model, folder, budget).run(asked, run.feeds), strict=True))
    references = {name: array for name, array in run.outputs.items() if name in found and found[name].dtype.kind == "f"}
    references |= {value: taps.rows(key) for value, key in keys.items()}
    factors = _moved_channels(model, folder, points, run.norms)
    references = {
        name: (array * factors.get(name, 1.0)).reshape(found[name].shape).astype(found[name].dtype, copy=False)
        for name, array in references.items()
        if array.size == found[name].size
    }
    inner = [name for name in references if name in keys]
    cut = cut_at(model, inner)
    feeds = {**run.feeds, **run.reference_feeds} | {f"{name}{REFERENCE_SUFFIX}": references[name] for name in inner}
    cut.graph.input.extend(onnx.ValueInfoProto(name=f"{name}{REFERENCE_SUFFIX}") for name in inner)
    names = [*dict.fromkeys([*references, *outputs])]
    own = dict(zip(names, PiecedGraph(cut, folder, budget).run(names, feeds), strict=True))
    judged = segments(model.graph, references)
    return _errors(run, judged, keys, references, found, own), {name: own[name] for name in outputs}


def tolerance_of(formats: Iterable[str]) -> float:
    """The loosest tolerance among the formats of the weights that an operator reads; float32 where it reads none."""
    return max((_tolerance(label) for label in formats), default=_TOLERANCES["float32"])


def relative_l2(reference: Array, candidate: Array) -> float:
    """|candidate - reference| / |reference| in float64; infinite where the candidate is not finite."""
    a, b = (np.asarray(side, np.float64).reshape(-1) for side in (reference, candidate))
    if not np.isfinite(b).all():
        return math.inf
    error, size = float(np.linalg.norm(b - a)), float(np.linalg.norm(a))
    return 0.0 if error == 0 else error / size if size > 0 else math.inf


def _tolerance(label: str) -> float:
    return next((_TOLERANCES[key] for key in sorted(_TOLERANCES, key=len, reverse=True) if label.startswith(key)), 0.2)


def _moved_channels(
    model: ModelProto, folder: Path, points: Sequence[Point], norms: Mapping[str, Array]
) -> dict[str, Array]:
    """Results of norms whose weight is the reference's times a factor a channel [K], by value.

    Only where quantized linears read them, whose weights take the factors back. A float graph has no reason to.
    """
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, Array] = {}
    for point in points:
        weight = weights.get(f"{point.module}.weight")
        if point.side == "in" or point.module not in norms or weight is None:
            continue
        if readers.get(point.value) not in _ROUNDING:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            factors_K = onnx.numpy_helper.to_array(weight, str(folder)) / norms[point.module]
        exact_K = np.exp2(np.rint(np.log2(np.where(factors_K > 0, factors_K, 1.0))))
        near = np.isclose(factors_K, exact_K, rtol=0.2)  # a weight that is wrong besides is not hidden by this
        found[point.value] = np.where(near, exact_K, np.where(np.isfinite(factors_K), factors_K, 1.0))
    return found


def _errors(
    run: RoleRun,
    judged: Sequence[Segment],
    keys: Mapping[str, tuple[str, str, str]],
    references: Mapping[str, Array],
    found: Mapping[str, Array],
    own: Mapping[str, Array],
) -> tuple[OperatorError, ...]:
    layers: dict[str, int | None] = {}
    errors: list[OperatorError] = []
    for segment in judged:
        value = segment.value
        own_layers = [layer_of(module) for module in segment.modules]
        before = [layer for name in segment.inputs if (layer := layers.get(name)) is not None]
        layers[value] = own_layers[0] if own_layers else max(before, default=None)
        whole = tensor_errors(references[value], found[value]).metrics()
        formats = [run.formats.get(f"{module}.weight", "float32") for module in segment.modules]
        errors.append(
            OperatorError(
                role=run.role,
                layer=layers[value],
                name=_name(segment, keys.get(value)),
                operators=segment.operators,
                own=relative_l2(references[value], own[value]),
                accumulated=relative_l2(references[value], found[value]),
                tolerance=tolerance_of(formats),
                phase=run.phase,
                snr_db=whole.snr_db,
                cosine_min=whole.cosine_min,
                max_abs=whole.max_abs,
            )
        )
    return tuple(errors)


def _name(segment: Segment, key: tuple[str, str, str] | None) -> str:
    if key is None:
        return segment.value
    return key[1] if key[2] == "out" else f"{key[1]} input"
