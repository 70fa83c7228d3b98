"""How large the values of a graph get: what was seen where modules read and write, and bounds of all between.

Modules are what calibration can watch, weights by weights. The few operators between them are bounded by what they do:
a sum by the sum of its operands, an attention by its values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

__all__ = ["Ranges", "headroom", "module_of", "value_ranges"]

_MODULES = {"FusedMatMul", "MatMulNBits", "MatMulBnb4", "Conv", "RMSNormalization", "LayerNormalization"}
# Of these the result has no value that the first input has not: none at all is lost by the first group.
_MOVERS = {"Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_PICKERS = _MOVERS | {"Expand", "Gather", "Gelu", "Pad", "ReduceMax", "ReduceMean", "Slice", "Split"}
_UNIT = {"Cos", "Sigmoid", "Sin", "Softmax", "Tanh"}
_VALUE = 2  # the input of an attention whose means its result has
_CODES = "_Q"


@dataclass
class Ranges:
    """Largest absolute values of one role, on calibration data. Modules go by the name of their weight."""

    inputs: dict[str, float] = field(default_factory=dict[str, float])  # of the role, by name
    parameters: dict[str, float] = field(default_factory=dict[str, float])
    reads: dict[str, float] = field(default_factory=dict[str, float])
    writes: dict[str, float] = field(default_factory=dict[str, float])  # the bias added


def value_ranges(graph: ir.Graph, ranges: Ranges) -> dict[ir.Value, float]:
    """Bounds of absolute values; what is missing is unknown."""
    found = {value: ranges.inputs[str(value.name)] for value in graph.inputs if value.name in ranges.inputs}
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            found[value] = _largest(value.const_value.numpy())
        elif name in ranges.parameters:
            found[value] = ranges.parameters[name]
    seen = _seen(graph, ranges)
    for node in graph:
        for output, bound in zip(node.outputs, _bounds(node, found), strict=False):
            known = [size for size in (bound, seen.get(output)) if size is not None]
            if known:
                found[output] = min(known)
    return found


def module_of(node: ir.Node | None) -> str | None:
    """The name of the weight of a linear, a convolution or a norm."""
    if node is None or node.op_type not in _MODULES or node.inputs[1] is None:
        return None
    name = str(node.inputs[1].name)
    return name.removesuffix(_CODES) if node.op_type.startswith("MatMul") else name


def _seen(graph: ir.Graph, ranges: Ranges) -> dict[ir.Value, float]:
    """What modules were seen to read and write, at the values of the graph."""
    seen: dict[ir.Value, float] = {}
    for node in graph:
        name = module_of(node)
        if name is None or name not in ranges.reads:
            continue
        smaller = headroom(node)
        value = node.inputs[0] if smaller == 1 else _scaled(node.inputs[0])[0]
        while value is not None:
            seen[value] = ranges.reads[name]
            producer = value.producer()
            value = producer.inputs[0] if producer is not None and producer.op_type in _MOVERS else None
        _see_result(node, name, smaller, ranges, seen)
    return seen


def _see_result(node: ir.Node, name: str, smaller: float, ranges: Ranges, seen: dict[ir.Value, float]) -> None:
    """Of a linear the bias is a node of its own, which a module is not seen without."""
    bias = ranges.parameters.get(f"{name.removesuffix('weight')}bias", 0.0)
    is_linear = "MatMul" in node.op_type
    value = node.outputs[0]
    seen[value] = (ranges.writes[name] + bias) * smaller if is_linear else ranges.writes[name]
    if not is_linear:
        return
    for user in _users(value):
        if smaller != 1 and user.op_type == "Cast":
            (user,) = _users(user.outputs[0])
            seen[user.outputs[0]] = ranges.writes[name] + bias
            user = next(iter(_users(user.outputs[0])), user)
        if user.op_type == "Add" and any(_is_parameter(other) for other in user.inputs):
            seen[user.outputs[0]] = ranges.writes[name]


def headroom(node: ir.Node) -> float:
    """The factor by which what goes into a linear was made smaller, and what comes out larger; 1 where it was not."""
    factor = _scaled(node.inputs[0])[1]
    if factor is None or "MatMul" not in node.op_type:
        return 1.0
    for cast in _users(node.outputs[0]):
        for user in _users(cast.outputs[0]) if cast.op_type == "Cast" else ():
            if user.op_type == "Mul" and _scaled(user.outputs[0])[1] == 1 / factor:
                return factor
    return 1.0


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float | None]:
    """(x, c) of a value that is x * c, c a constant of one number."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return None, None
    for x, factor in (node.inputs, reversed(node.inputs)):
        array = _constant(factor)
        if array is not None and array.size == 1:
            return x, float(array.ravel()[0])
    return None, None


def _bounds(node: ir.Node, found: Mapping[ir.Value, float]) -> list[float | None]:
    """Of the results of an operator, in their order."""
    sizes = [None if value is None else found.get(value) for value in node.inputs]
    known = [size for size in sizes if size is not None]
    op = node.op_type
    if op == "Constant":
        array = _constant(node.outputs[0])
        return [None if array is None else _largest(array)]
    if op == "GroupQueryAttention":
        return [sizes[_VALUE], sizes[1], sizes[_VALUE]]
    if op == "PackedMultiHeadAttention":
        return [sizes[_VALUE]]
    if op in _PICKERS:
        return [sizes[0]] * len(node.outputs)
    if op in _UNIT:
        return [1.0]
    if op == "RotaryEmbedding":
        return [None if sizes[0] is None else math.sqrt(2) * sizes[0]]
    if op == "MatMul" and _is_softmax(node.inputs[0]):
        return [sizes[1]]
    if op == "Div" and _is_length(node.inputs[1]):
        return [1.0]
    if op in ("Concat", "Where"):
        floats = sizes if op == "Concat" else sizes[1:]
        return [max(known) if all(size is not None for size in floats) else None]
    if op in ("Add", "Sub", "Mul") and len(known) == 2:
        return [known[0] * known[1] if op == "Mul" else known[0] + known[1]]
    return [None]


def _is_softmax(value: ir.Value | None) -> bool:
    """True for weights of an attention, moved about at most."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _MOVERS:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "Softmax"


def _is_length(value: ir.Value | None) -> bool:
    """True for a Euclidean norm, kept off 0: what it divides has values up to 1."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _MOVERS | {"Clip", "Expand", "Max"}:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "ReduceL2"


def _is_parameter(value: ir.Value | None) -> bool:
    """True for an initializer, cast at most."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Cast":
        value = node.inputs[0]
    return value is not None and value.is_initializer()


def _users(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant that is a float."""
    if value is None:
        return None
    tensor = value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
    elif node is not None and node.op_type == "Constant" and "value_float" in node.attributes:
        return np.array(node.attributes["value_float"].as_float())
    return None if tensor is None or not tensor.dtype.is_floating_point() else tensor.numpy()


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array.astype(np.float64)).max()) if array.size and array.dtype.kind != "b" else 0.0
