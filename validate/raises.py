"""What raising a layer would gain: the variant with that one layer in floats, beside the variant as it is.

A recipe may have scaled values inside a layer (balance, AWQ), never those between layers, so that a layer's parameters
are taken from the float graph all together. Few layers are measured: those whose recorded sensitivity at their bits is
largest, where bits were chosen by measurement, else those whose error grows most over the layer before.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ..runtime.package import Package
from ..runtime.prepare import Prepared
from ..runtime.session import GraphSession
from .advice import layers_to_raise
from .intervals import ratio
from .linears import float_linear, quantized_linears
from .metrics import LogitErrors, logit_errors
from .mixed import MixedModel, float_type, save_graph
from .points import layer_of
from .stages import logits_without_cache
from .waterfall import float_graph

if TYPE_CHECKING:
    from .insides import LayerDrift

__all__ = ["Raise", "measure_raises", "raised_graph"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]
Request = tuple[Prepared, Sequence[int], Array]  # prompt, forced ids, the reference's logits [N, V] after them
_NUM_LAYERS = 6  # measured: each is a copy of its graph on disk, for as long as it runs
_NUM_SAMPLES = 8


@dataclass(frozen=True)
class Raise:
    """One layer in floats. KL(reference || variant) in nats, over the answers' positions; the interval is paired."""

    role: str
    layer: int
    stage: str
    num_samples: int
    before: float
    after: float
    gain: float  # before - after
    ci_low: float
    ci_high: float
    num_bytes: int  # that the layer would grow by


def measure_raises(
    package: Package,
    variant: str,
    drift: "Sequence[LayerDrift]",
    requests: Sequence[Request],
    folder: Path,
    video_rule: str | None,
    progress: Progress,
) -> tuple[Raise, ...]:
    """Largest gain first. Empty where the package has no float graph to take a layer from, or none is quantized."""
    asked = requests[:_NUM_SAMPLES]
    before = _errors(package, variant, {}, asked, video_rule)
    found: list[Raise] = []
    layers = _shortlist(package, variant, drift)
    for number, layer in enumerate(layers):
        progress(number, len(layers), f"{variant}, {layer.stage} in floats")
        floats = float_graph(package, layer.role)
        graph = package.graph_path(layer.role, variant)
        made = None if floats is None or layer.layer is None else raised_graph(graph, floats, layer.layer, folder)
        if made is None or layer.layer is None:
            continue
        file, num_bytes = made
        after = _errors(package, variant, {layer.role: file}, asked, video_rule)
        for part in file.parent.glob(f"{file.stem}.*"):
            part.unlink()
        sizes = np.array([errors.kl.size for errors in before], float)
        sums = [np.array([errors.kl.sum() for errors in side]) for side in (before, after)]
        gain = ratio(sums[0] - sums[1], sizes)
        made_of = Raise(
            role=layer.role,
            layer=layer.layer,
            stage=layer.stage,
            num_samples=len(asked),
            before=float(sums[0].sum() / sizes.sum()),
            after=float(sums[1].sum() / sizes.sum()),
            gain=gain.value,
            ci_low=gain.ci_low,
            ci_high=gain.ci_high,
            num_bytes=num_bytes,
        )
        found.append(made_of)
    return tuple(sorted(found, key=lambda one: -one.gain))


def raised_graph(graph: Path, floats: Path, layer: int, folder: Path) -> tuple[Path, int] | None:
    """A copy of `graph` in `folder` whose layer has the parameters of the graph `floats`, and the bytes it grew by.

    None where nothing of that layer is quantized as a linear, or the float graph has no weights of these names.
    """
    model = onnx.load(graph)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    linears = [linear for linear in quantized_linears(model.graph) if layer_of(linear.parameter) == layer]
    wide = onnx.load(floats, load_external_data=False)
    known = {tensor.name: tensor for tensor in wide.graph.initializer}
    if not linears or any(linear.parameter not in known for linear in linears):
        return None
    grown = 0
    for linear in linears:
        weight = known[linear.parameter]
        assert tuple(weight.dims) == linear.shape, linear.parameter
        grown += _replace(stored, weight, floats.parent, float_type(linear, stored))
        grown -= sum(_size(stored[name]) for name in linear.node.input if name in stored)
        linear.node.CopyFrom(float_linear(linear, linear.parameter))
    for name in [name for name in stored if layer_of(name) == layer and name in known]:
        if name not in {linear.parameter for linear in linears}:
            _replace(stored, known[name], floats.parent, helper.tensor_dtype_to_np_dtype(stored[name].data_type))
    return save_graph(model, stored, folder / f"raised_{graph.name}"), grown


def _replace(stored: dict[str, TensorProto], tensor: TensorProto, folder: Path, dtype: Any) -> int:
    """Puts a float tensor among those of a graph, in the type that the graph computes in. Returns its bytes."""
    if tensor.data_location == TensorProto.EXTERNAL:
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = TensorProto.DEFAULT
    values = onnx.numpy_helper.to_array(tensor).astype(dtype)
    stored[tensor.name] = onnx.numpy_helper.from_array(values, tensor.name)
    return values.nbytes


def _size(tensor: TensorProto) -> int:
    return onnx.numpy_helper.to_array(tensor).nbytes


def _errors(
    package: Package, variant: str, graphs: dict[str, Path], requests: Sequence[Request], video_rule: str | None
) -> list[LogitErrors]:
    pool: dict[Path, GraphSession] = {}
    errors: list[LogitErrors] = []
    for prepared, forced_ids, reference in requests:
        model = MixedModel(package, variant, graphs, pool, video_rule)
        visual = model.features(prepared)
        embeds = model.embed(prepared, None if visual is None else visual.features)
        errors.append(logit_errors(reference, logits_without_cache(model, prepared, embeds, forced_ids)))
    return errors


def _shortlist(package: Package, variant: str, drift: "Sequence[LayerDrift]") -> "list[LayerDrift]":
    by_layer: dict[tuple[str, int | None], LayerDrift] = {
        (one.role, one.layer): one for one in drift if one.layer is not None
    }
    recorded = _recorded(package, variant)
    if recorded:
        largest = sorted(recorded, key=lambda key: -recorded[key])
        return [by_layer[key] for key in largest if key in by_layer][:_NUM_LAYERS]
    stages = layers_to_raise({"layers": [vars(one) for one in drift]}, _NUM_LAYERS)
    return [one for stage in stages for one in by_layer.values() if one.stage == stage]


def _recorded(package: Package, variant: str) -> dict[tuple[str, int | None], float]:
    """By layer the losses that its weights had at the bits they are stored in, where that was measured."""
    found = package.variant(variant)
    losses: dict[tuple[str, int | None], float] = defaultdict(float)
    for key, by_bits in (found.allocation.sensitivity if found.allocation is not None else {}).items():
        role, _, parameter = key.partition("/")
        bits = re.search(r"\d+", found.graphs[role].formats.get(parameter, "") if role in found.graphs else "")
        if bits is not None and bits[0] in by_bits:
            losses[role, layer_of(parameter)] += by_bits[bits[0]]
    return losses
