"""Float graphs of a checkpoint and the sources of their weights: the part of an export that no recipe changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ..quant.store import WeightSource
from .bitsandbytes import keep_packed
from .checkpoint import Checkpoint, CheckpointSource, resolve
from .family import FamilySpec, RoleSpec, family_of
from .lower import COMPUTE_DTYPE, Target, lower
from .trace import trace

__all__ = ["FloatGraphs", "float_graphs"]


@dataclass(frozen=True)
class FloatGraphs:
    """Lowered graphs without weights, and where the weights are, both by role."""

    checkpoint: Checkpoint
    family: FamilySpec
    graphs: Mapping[str, ir.Model]
    sources: Mapping[str, WeightSource]
    num_parameters: int

    def open_role(self, role: str) -> tuple[ir.Model, WeightSource]:
        """A copy of the role's graph to change, and its weights."""
        return self.graphs[role].clone(), self.sources[role]


def float_graphs(path: str | Path, target: Target, progress: Callable[[str], None] = lambda what: None) -> FloatGraphs:
    """Traces and lowers every role of a checkpoint, and finds a tensor for each parameter.

    Raises CheckpointError on anything in the checkpoint that does not fit, before a byte is written.
    """
    checkpoint = Checkpoint.open(path)
    family = family_of(checkpoint.config, checkpoint.path / "config.json")
    config = family.completed(checkpoint.config, checkpoint.documents)
    roles = family.roles(config)
    graphs: dict[str, ir.Model] = {}
    for name, role in roles.items():
        progress(f"tracing {name}")
        graphs[name] = _graph(role, target)
    shapes = {name: _parameters(model) for name, model in graphs.items()}
    wanted = {
        (name, parameter): roles[name].tensor(parameter, shape)
        for name, parameters in shapes.items()
        for parameter, shape in parameters.items()
    }
    stored = resolve(
        checkpoint,
        {f"{role}/{parameter}": ref for (role, parameter), ref in wanted.items()},
        family.normalise,
        lambda name: family.unused(config, name),
    )
    sources: dict[str, WeightSource] = {}
    for name, parameters in shapes.items():
        tensors = {parameter: stored[f"{name}/{parameter}"] for parameter in parameters}
        sources[name] = keep_packed(graphs[name], tensors, CheckpointSource(tensors, parameters))
    sizes = {ref.name: ref.num_elements for ref in wanted.values()}
    return FloatGraphs(checkpoint, family, graphs, sources, sum(sizes.values()))


def _graph(role: RoleSpec, target: Target) -> ir.Model:
    model = trace(role, COMPUTE_DTYPE[target])
    lower(model, target)
    for value, port in zip(model.graph.inputs, role.inputs, strict=True):
        if port.default is not None:  # an initializer of the same name makes an input optional
            value.const_value = ir.tensor(list(port.default), dtype=ir.DataType.INT64, name=port.name)
            model.graph.initializers[port.name] = value
    return model


def _parameters(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shape of every initializer that waits for its values."""
    return {
        name: tuple(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is None and value.shape is not None
    }
