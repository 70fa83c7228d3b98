"""Finds the first operator of a package that computes something else than the reference.

Both sides are tapped at the same points (points.py, reference_taps.py) on the same request. Each operator is judged
twice: by its value in the whole run (`accumulated`), and by what it gives when it is fed the reference's own values
(`own`). The second tells a wrong operator from one that is fed wrong values, so a fault is found where it is, and the
tolerance can be that of one operator: far below what adds up over a model.

Errors are relative L2: |candidate - reference| / |reference|. Where a recipe has moved factors from one weight into
those behind it, which gives the same function, what lies between is compared and fed by its own scale (moved.py).
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from .metrics import tensor_errors
from .moved import WeightOf, moved_channels
from .pieces import PiecedGraph
from .points import REFERENCE_SUFFIX, Segment, cut_at, find_points, layer_of, segments
from .reference_taps import TapStore

__all__ = ["OperatorError", "RoleRun", "judge_role", "relative_l2", "tolerance_of"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]

# By how an operator's weight is stored: relative L2 of one operator that is fed exact values. Several times what sound
# packages have (tests/test_bisect.py); float32 kernels differ in the order of sums alone.
_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "int8": 0.02, "int8-dynamic": 0.05, "int4": 0.2, "nf4": 0.2}
_CACHED = ("present.", "past_key_values.")
_CACHE_TOLERANCE = 0.1  # of an attention on keys and values in 8 bits; large ones are clipped


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
    weight_of: WeightOf  # the reference's
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
    found = {name: _in_floats(model, name, array) for name, array in found.items()}
    references = {name: array for name, array in run.outputs.items() if name in found and found[name].dtype.kind == "f"}
    references |= {value: taps.rows(key) for value, key in keys.items()}
    factors = moved_channels(model, folder, points, run.weight_of)
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
    floats = {name: _in_floats(model, name, array) for name, array in own.items()}
    return _errors(run, judged, keys, references, found, floats), {name: own[name] for name in outputs}


def _in_floats(model: ModelProto, name: str, array: Array) -> Array:
    """Keys and values [1, G, T, H] that a cache holds as codes, or divided, by the scales that the graph names."""
    stored = next((e.value for e in model.metadata_props if e.key == f"{name.replace(*_CACHED)}.scale"), None)
    if stored is None:
        return array
    scales = np.frombuffer(base64.b64decode(stored), np.float32)
    return array * (scales if len(scales) == 1 else scales.reshape(array.shape[1], 1, -1))


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
                tolerance=max(tolerance_of(formats), _CACHE_TOLERANCE if segment.rounds_cache else 0.0),
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
