"""What the graphs of a package are made of: nodes by operator, and the bytes that a decode step reads."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto

__all__ = ["count_nodes", "weight_bytes"]

_LOOKUPS = ("Gather", "GatherBlockQuantized")  # read some rows of a table, not the table


def count_nodes(file: Path) -> dict[str, int]:
    """Nodes by operator ("MatMul", "com.microsoft.MatMulNBits"), those inside loops and local functions included."""
    model = onnx.load(file, load_external_data=False)
    nodes = [*_nodes(model.graph.node)]
    for function in model.functions:
        nodes += _nodes(function.node)
    return dict(sorted(Counter(_operator(node) for node in nodes).items()))


def weight_bytes(file: Path) -> int:
    """Bytes of all initializers that are read as a whole whenever the graph runs."""
    model = onnx.load(file, load_external_data=False)
    looked_up = {node.input[0] for node in model.graph.node if node.op_type in _LOOKUPS}
    return sum(_num_bytes(tensor) for tensor in model.graph.initializer if tensor.name not in looked_up)


def _nodes(nodes: "list[NodeProto] | object") -> Iterator[NodeProto]:
    for node in nodes:  # pyright: ignore[reportGeneralTypeIssues]: a repeated field of a message
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                if isinstance(graph, GraphProto):
                    yield from _nodes(graph.node)


def _operator(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _num_bytes(tensor: TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
