"""The residual stream in float32, in graphs that compute in float16.

Published models leave float16's range (65504) where blocks add to the stream: the down projection of the last vision
block of Qwen2.5-VL-3B does (github.com/ggml-org/llama.cpp/issues/17534), and what follows is NaN. Linears still read
and write float16, as kernels want it; what goes into the last linear of an MLP is made 64 times smaller, and what
comes out of it as much larger, in float32. Powers of two round nothing, but where float16 ends at the small side.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

__all__ = ["WideResidual"]

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_HEADROOM = 64.0
_MOVERS = {"Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}  # of their first input
_ATTENTION = {"GroupQueryAttention", "MultiHeadAttention", "PackedMultiHeadAttention"}  # means of values: no headroom


class WideResidual(InPlacePass):
    """Makes the sums float32 that add the result of a linear to the stream, and lets norms read float32."""

    def call(self, model: ir.Model) -> PassResult:
        stream = _Stream(model.graph)
        for node in list(model.graph):
            stream.visit(node)
        return PassResult(model, bool(stream.wide))


class _Stream:
    """Goes through the nodes in order; `wide` are the values that are float32 now and were float16."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.wide: set[ir.Value] = set()
        self._narrowed: dict[ir.Value, ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        if node.op_type in ("RMSNormalization", "LayerNormalization"):
            self._norm(node)
        elif _is_residual(node):
            for index in range(2):
                node.replace_input_with(index, self._widened(node, index))
            self._mark(node.outputs[0])
        elif self._moves(node):
            self._mark(node.outputs[0])
        elif node.op_type not in ("Cast", "Shape"):  # a Cast to float32 does nothing now; ONNX Runtime drops it
            for index, value in enumerate(node.inputs):
                if value in self.wide:
                    node.replace_input_with(index, self._narrow(value))

    def _moves(self, node: ir.Node) -> bool:
        """Whether all values of the result are float32 now: a Concat has those of all its inputs."""
        if node.op_type == "Concat":
            return self.wide.issuperset(node.inputs)
        return bool(node.inputs) and node.inputs[0] in self.wide and node.op_type in _MOVERS

    def _mark(self, value: ir.Value) -> None:
        value.type = ir.TensorType(_SINGLE)  # not value.dtype: values may share the object
        self.wide.add(value)

    def _norm(self, node: ir.Node) -> None:
        """RMSNormalization takes a scale of another dtype, which is that of its result; LayerNormalization does not."""
        x = node.inputs[0]
        assert x is not None
        wide = x if x in self.wide else _before_cast(x)
        if wide is None:
            return
        node.replace_input_with(0, wide)
        if node.op_type == "RMSNormalization":
            return
        for index, parameter in enumerate(node.inputs[1:], 1):
            if parameter is not None:
                node.replace_input_with(index, self._cast(parameter, _SINGLE, node))
        result = node.outputs[0]
        narrow = ir.node("Cast", [result], {"to": _HALF})
        narrow.outputs[0].type = ir.TensorType(_HALF)
        self.graph.insert_after(node, narrow)
        result.replace_all_uses_with(narrow.outputs[0])
        narrow.replace_input_with(0, result)
        result.type = ir.TensorType(_SINGLE)

    def _widened(self, node: ir.Node, index: int) -> ir.Value:
        """An operand of a residual sum in float32."""
        value = node.inputs[index]
        assert value is not None
        if value in self.wide:
            return value
        source = _before_cast(value)
        if source is not None:
            return source
        linear, bias = _linear(value)
        if linear is None or _is_attention(linear):
            return self._cast(value, _SINGLE, node)
        smaller = self._times(linear.inputs[0], 1 / _HEADROOM, _HALF, linear)
        linear.replace_input_with(0, smaller)
        wide = self._times(self._cast(linear.outputs[0], _SINGLE, node), _HEADROOM, _SINGLE, node)
        if bias is None:
            return wide
        return self._put(ir.node("Add", [wide, self._cast(bias, _SINGLE, node)]), _SINGLE, node)

    def _narrow(self, value: ir.Value) -> ir.Value:
        """The value in float16, cast once."""
        if value not in self._narrowed:
            producer = value.producer()
            assert producer is not None
            cast = ir.node("Cast", [value], {"to": _HALF})
            cast.outputs[0].type = ir.TensorType(_HALF)
            self.graph.insert_after(producer, cast)
            self._narrowed[value] = cast.outputs[0]
        return self._narrowed[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        return self._put(ir.node("Cast", [value], {"to": dtype}), dtype, before)

    def _times(self, value: ir.Value | None, factor: float, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        constant = ir.node("Constant", [], {"value": ir.tensor([factor], dtype=dtype)})
        factors = self._put(constant, dtype, before)
        return self._put(ir.node("Mul", [value, factors]), dtype, before)

    def _put(self, node: ir.Node, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        self.graph.insert_before(before, node)
        node.outputs[0].type = ir.TensorType(dtype)
        return node.outputs[0]


def _is_residual(node: ir.Node) -> bool:
    """A sum of two computed float16 values, one of them the result of a linear that nothing else reads."""
    if node.op_type != "Add" or node.outputs[0].dtype != _HALF:
        return False
    if any(value is None or value.producer() is None for value in node.inputs):
        return False
    return any(_linear(value)[0] is not None for value in node.inputs if value is not None)


def _linear(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """(the linear that gave a value, its bias), each None where there is none."""
    node = value.producer()
    if node is None or len(list(value.uses())) != 1:
        return None, None
    if node.op_type == "FusedMatMul":
        return node, None
    product, bias = node.inputs[:2] if node.op_type == "Add" else (None, None)
    if product is None or bias is None or not bias.is_initializer():
        return None, None
    linear = product.producer()
    single = len(list(product.uses())) == 1
    return (linear, bias) if linear is not None and linear.op_type == "FusedMatMul" and single else (None, None)


def _is_attention(linear: ir.Node) -> bool:
    """True where the linear reads what an attention gave, moved about at most."""
    value = linear.inputs[0]
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _MOVERS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in _ATTENTION


def _before_cast(value: ir.Value) -> ir.Value | None:
    """The float32 value that was cast to this one, if it was."""
    node = value.producer()
    if node is None or node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype != _SINGLE:
        return None
    return node.inputs[0]
