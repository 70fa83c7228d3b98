"""Points of a graph: the values that reference and package both have, found by the names of parameters.

A linear, norm or embedding is known on both sides by its parameter, whatever the recipe made of the weight. What goes
into it and what comes out of it are points; the nodes between points are what a difference is blamed on. Layers are
unrolled in the graphs of a package, so that every one of them has nodes of its own to be tapped.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["REFERENCE_SUFFIX", "Point", "Segment", "cut_at", "find_points", "layer_of", "read_names", "segments"]

REFERENCE_SUFFIX = "__reference"
_LINEARS = {
    *("FusedMatMul", "MatMul", "Gemm", "MatMulNBits", "MatMulBnb4", "IntegerLinear"),
    *("Gather", "GatherBlockQuantized"),
}
_NORMS = {"RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization"}
_STORED = re.compile(r"(?P<module>.+)\.weight(_Q)?")
_MOVERS = {
    *("Cast", "Concat", "Constant", "Expand", "Gather", "Identity", "Range", "Reshape", "Shape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
}
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Point:
    """One value of a graph beside what the reference's module takes (`in`) or gives (`out`)."""

    value: str  # its name in the graph
    module: str  # path of the module that owns the parameter, e.g. layers.0.mlp.down_proj
    side: str  # "in" or "out"


@dataclass(frozen=True)
class Segment:
    """The nodes that make one known value out of others."""

    value: str
    inputs: tuple[str, ...]  # known values that it is made of
    operators: tuple[str, ...]  # their types in order, without what only moves values about
    modules: tuple[str, ...]  # whose parameters it reads
    rounds_cache: bool = False  # an attention among them keeps keys and values in 8 bits


def layer_of(module: str) -> int | None:
    """The number of the block that a module belongs to, None outside of blocks."""
    found = _NUMBERED.search(f"{module}.")
    return int(found[1]) if found else None


@dataclass(frozen=True)
class _Wiring:
    """Who makes and who reads each value of a graph."""

    producers: Mapping[str, NodeProto]
    consumers: Mapping[str, list[NodeProto]]
    initializers: frozenset[str]
    ends: frozenset[str]  # inputs and outputs of the graph

    @classmethod
    def of(cls, graph: GraphProto) -> "_Wiring":
        consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in read_names(node):
                consumers.setdefault(name, []).append(node)
        return cls(
            producers={name: node for node in graph.node for name in node.output if name},
            consumers=consumers,
            initializers=frozenset(tensor.name for tensor in graph.initializer),
            ends=frozenset(value.name for value in (*graph.input, *graph.output)),
        )

    def parameter(self, name: str) -> str:
        """The initializer behind a value, cast or not; empty where there is none."""
        node = self.producers.get(name)
        if node is not None and node.op_type == "Cast":
            name = node.input[0]
        return name if name in self.initializers else ""


def read_names(node: NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names |= {name for inner in graph.node for name in read_names(inner)}
    return names


def find_points(graph: GraphProto, modules: Iterable[str]) -> tuple[Point, ...]:
    """Points of the modules (paths) whose `weight` the graph reads in a linear, norm or embedding, in graph order."""
    wiring, known = _Wiring.of(graph), frozenset(modules)
    points: list[Point] = []
    for node in graph.node:
        if node.op_type not in _LINEARS | _NORMS:
            continue
        stored = [_STORED.fullmatch(wiring.parameter(name)) for name in node.input]
        module = next((found["module"] for found in stored if found is not None), "")
        if module not in known:
            continue
        if not node.op_type.startswith("Gather"):
            points.append(Point(_data_input(wiring, node), module, "in"))
        points.append(Point(_result(wiring, node.output[0], module), module, "out"))
    return tuple(point for point in points if point.value not in wiring.initializers)


def segments(graph: GraphProto, known: Iterable[str]) -> tuple[Segment, ...]:
    """What makes each known value, in graph order; values that the graph takes as they are have no segment."""
    wiring, cuts = _Wiring.of(graph), frozenset(known)
    order = {id(node): number for number, node in enumerate(graph.node)}
    # Backwards within a node: an attention's keys, which tell of positions and rotation, before what it gives.
    made = [name for node in graph.node for name in reversed(node.output) if name in cuts]
    return tuple(_segment(wiring, value, cuts, order) for value in made)


def cut_at(model: ModelProto, values: Iterable[str]) -> ModelProto:
    """A copy whose nodes read an input `<value>__reference` wherever they read one of `values`."""
    cut = ModelProto()
    cut.CopyFrom(model)
    names = {value: f"{value}{REFERENCE_SUFFIX}" for value in values}
    for node in cut.graph.node:
        _rename_inputs(node, names)
    return cut


def _rename_inputs(node: NodeProto, names: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                _rename_inputs(inner, names)


def _data_input(wiring: _Wiring, node: NodeProto) -> str:
    """What a linear or norm computes with: codes of activations come from the values that were rounded."""
    name = node.input[0]
    producer = wiring.producers.get(name)
    return producer.input[0] if producer is not None and producer.op_type == "QuantizeTokens" else name


def _result(wiring: _Wiring, name: str, module: str) -> str:
    """The value once its bias is added, behind casts."""
    while name not in wiring.ends and len(readers := wiring.consumers.get(name, [])) == 1:
        (reader,) = readers
        others = [other for other in reader.input if other != name]
        is_bias = reader.op_type == "Add" and len(others) == 1 and wiring.parameter(others[0]) == f"{module}.bias"
        if reader.op_type != "Cast" and not is_bias:
            break
        name = reader.output[0]
    return name


def _segment(wiring: _Wiring, value: str, cuts: frozenset[str], order: Mapping[int, int]) -> Segment:
    nodes: dict[int, NodeProto] = {}
    inputs: dict[str, None] = {}
    left = [value]
    while left:
        node = wiring.producers.get(left.pop())
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node
        for name in read_names(node):
            if name in cuts:
                inputs[name] = None
            else:
                left.append(name)
    ordered = [nodes[key] for key in sorted(nodes, key=order.__getitem__)]
    parameters = (_STORED.fullmatch(wiring.parameter(name)) for node in ordered for name in node.input)
    telling = [node.op_type for node in ordered if node.op_type not in _MOVERS]
    return Segment(
        value=value,
        inputs=tuple(inputs),
        operators=tuple(dict.fromkeys(telling or [node.op_type for node in ordered])),
        modules=tuple(dict.fromkeys(found["module"] for found in parameters if found is not None)),
        rounds_cache=any(attribute.name == "kv_cache_bit_width" for node in ordered for attribute in node.attribute),
    )
