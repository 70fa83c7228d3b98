"""Where ONNX Runtime's CUDA provider runs the nodes of a graph, told without a GPU: a prediction.

It follows what ONNX Runtime does: a node goes to the GPU where there is a kernel for its types (cuda_kernels.py), but
for arithmetic on shapes, which stays on the CPU; and where a kernel reads on one side what was computed on the other,
a copy is put in between.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ..quant.typed import typed
from ..runtime.placement import CPU, CUDA, NO_KERNEL, SHAPES, UNKNOWN, PlacedNode
from .cuda_kernels import HOST_INPUTS, HOST_OUTPUTS, KERNELS, VERSION

__all__ = ["VERSION", "Prediction", "Signature", "predict", "predict_file", "signature"]

_INDEX = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64", ir.DataType.STRING: "string"}


@dataclass(frozen=True, order=True)
class Signature:
    """What ONNX Runtime looks a kernel up by: an operator, and the dtypes of its inputs ("" for one left out)."""

    operator: str  # with its domain, if that is not ONNX's own
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """`copies` counts values that one side computes and the other reads."""

    nodes: tuple[PlacedNode, ...]
    copies: int


def predict_file(path: Path) -> Prediction:
    """The prediction for a graph file. Weights are not read."""
    model = ir.load(path)  # pyright: ignore[reportUnknownMemberType]
    return predict(typed(model))


def predict(model: ir.Model) -> Prediction:
    """The prediction for a graph that `typed` gave."""
    shapes = _shape_arithmetic(model.graph)
    nodes: list[PlacedNode] = []
    on_gpu: set[ir.Node] = set()
    for node in _nodes(model.graph):
        if node.op_type == "Constant":  # becomes a weight
            continue
        found = signature(node)
        known = KERNELS.get(found.operator, {}).get(found.inputs)
        provider = CUDA if known or known is None else CPU
        reason = UNKNOWN if known is None else None if known else NO_KERNEL
        if node in shapes:
            provider, reason = CPU, SHAPES
        if provider == CUDA:
            on_gpu.add(node)
        nodes.append(PlacedNode(str(node.name), found.operator, found.inputs, provider, reason))
    return Prediction(tuple(nodes), _copies(model.graph, on_gpu))


def signature(node: ir.Node) -> Signature:
    """What a node is looked up by."""
    domain = f"{node.domain}." if node.domain else ""
    return Signature(f"{domain}{node.op_type}", tuple(_dtype(value) for value in node.inputs))


def _dtype(value: ir.Value | None) -> str:
    if value is None:
        return ""
    if value.dtype is None:
        return "unknown"
    return _NAMES.get(value.dtype, value.dtype.name.lower())


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Those of subgraphs too."""
    return iter(ir.traversal.RecursiveGraphIterator(graph))


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _shape_arithmetic(graph: ir.Graph) -> set[ir.Node]:
    """Nodes on whole numbers that would want a copy on the GPU of what a Shape gave, and of nothing computed there."""
    on_host: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in _nodes(graph):
        if node.op_type in HOST_OUTPUTS:
            on_host.update(node.outputs)
            continue
        host = HOST_INPUTS.get(signature(node).operator, ())
        inputs = [value for index, value in enumerate(node.inputs) if value is not None and index not in host]
        whole = all(value.dtype in _INDEX for value in (*inputs, *node.outputs))
        free = all(value in on_host or _is_constant(value) or value.is_graph_input() for value in inputs)
        if whole and free and any(value in on_host for value in inputs):
            found.add(node)
            on_host.update(node.outputs)
    return found


def _copies(graph: ir.Graph, on_gpu: set[ir.Node]) -> int:
    """Values that have to cross: read on the host and computed on the GPU, or the other way round."""
    crossing: set[ir.Value] = set()
    for node in _nodes(graph):
        for value, wanted_on_host in _reads(node, on_gpu):
            producer = value.producer()
            if producer is None or _is_constant(value):
                continue
            is_on_host = producer not in on_gpu or producer.op_type in HOST_OUTPUTS
            if is_on_host != wanted_on_host:
                crossing.add(value)
    return len(crossing)


def _reads(node: ir.Node, on_gpu: set[ir.Node]) -> Iterable[tuple[ir.Value, bool]]:
    """The inputs of a node, and whether it reads them on the host. Shape reads no values at all."""
    if node.op_type in HOST_OUTPUTS:
        return
    host = HOST_INPUTS.get(signature(node).operator, ())
    for index, value in enumerate(node.inputs):
        if value is not None:
            yield value, node not in on_gpu or index in host
