"""Folds, places where a factor a channel can move from what writes a value into the linears that read it.

Dims: K inputs of a reading linear, C channels of the value.

    norm(x) * gamma + beta  ->  linears            gamma and beta are divided, columns of the readers multiplied
    up(x) * f(x)            ->  down               rows of up are divided
    attention(q, k, v(x))   ->  output projection  rows of v are divided; key/value heads are shared by query heads

In float nothing changes. Codes change: what is large in a channel no longer widens the range of its neighbours. Found
in the float graph of a role, by what its operators are linear in; names of modules play no part.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .rewrite import is_linear

__all__ = ["Fold", "Rows", "find_folds"]

Int64 = npt.NDArray[np.int64]

# Inputs of a norm that have a value a channel: the weight and, where there may be one, the bias.
_NORM_INPUTS = {("", "RMSNormalization"): (1,), ("", "LayerNormalization"): (1, 2)}
_MICROSOFT = "com.microsoft"
# Attentions, which are linear in their value channel by channel, by the last axis of that; graphs tell no shapes.
_VALUE = 2  # the input
_LAST_AXIS = {
    (_MICROSOFT, "GroupQueryAttention"): 2,
    (_MICROSOFT, "MultiHeadAttention"): 2,
    (_MICROSOFT, "PackedMultiHeadAttention"): 1,
    ("vlmport", "SegmentAttention"): 1,
    ("vlmport", "SegmentCrossAttention"): 1,
}


@dataclass(frozen=True)
class Rows:
    """Rows start to start + C of a parameter: all of it for a norm, one part of a fused query-key-value."""

    parameter: str
    start: int = 0


@dataclass(frozen=True)
class Fold:
    """Factors s [C]: `writers` are divided by s along their rows, columns of `readers` multiplied by s[channels].

    `channels` int64 [K] is the channel that each column of the readers reads.
    """

    readers: tuple[str, ...]
    writers: tuple[Rows, ...]
    channels: Int64

    @property
    def num_channels(self) -> int:
        return int(self.channels.max()) + 1


def find_folds(graph: ir.Graph) -> tuple[Fold, ...]:
    """Every fold of a float graph, in the order of its readers."""
    folds: list[Fold] = []
    seen: set[ir.Value] = set()
    for node in graph:
        if not is_linear(node) or node.inputs[0] is None or node.inputs[0] in seen:
            continue
        seen.add(node.inputs[0])
        found = _fold(node.inputs[0])
        if found is not None:
            folds.append(found)
    return tuple(folds)


def _fold(value: ir.Value) -> Fold | None:
    """The fold whose readers read `value`."""
    linears = [use.node for use in value.uses()]
    if value.is_graph_output() or not all(is_linear(node) and node.inputs[0] is value for node in linears):
        return None
    weights = [weight for node in linears if (weight := node.inputs[1]) is not None]
    if any(len(weight.uses()) != 1 or weight.const_value is not None for weight in weights):
        return None
    readers = tuple(dict.fromkeys(str(weight.name) for weight in weights))
    shape = weights[0].shape
    producer = value.producer()
    if producer is None or shape is None:
        return None
    num_columns = int(shape.numpy()[1])
    if producer.op_type == "Reshape" and (source := producer.inputs[0]) is not None and len(source.uses()) == 1:
        producer = source.producer()  # rows put side by side: columns repeat the channels
        if producer is None or (producer.domain, producer.op_type) not in _NORM_INPUTS:
            return None
    key = (producer.domain, producer.op_type)
    if key in _NORM_INPUTS:
        writers = _of_norm(producer)
        size = _length(producer.inputs[1])
        if not writers or not size or num_columns % size or (size != num_columns and value.producer() is producer):
            return None
        return Fold(readers, writers, np.arange(num_columns) % size)
    if key in _LAST_AXIS:
        return _of_attention(producer, readers, num_columns)
    if key == ("", "Mul"):
        for factor in producer.inputs:
            rows = _rows(factor)
            if rows is not None and rows[1] == num_columns:
                return Fold(readers, rows[0], np.arange(num_columns))
    return None


def _of_norm(norm: ir.Node) -> tuple[Rows, ...]:
    """Weight and bias, or none where one is shared or missing."""
    wanted = _NORM_INPUTS[norm.domain, norm.op_type]
    values = [value for i in wanted if i < len(norm.inputs) and (value := norm.inputs[i]) is not None]
    return tuple(Rows(str(value.name)) for value in values) if all(map(_is_own, values)) else ()


def _of_attention(attention: ir.Node, readers: tuple[str, ...], num_columns: int) -> Fold | None:
    rows = _rows(attention.inputs[_VALUE], _LAST_AXIS[attention.domain, attention.op_type])
    if rows is None:
        return None
    writers, num_channels = rows
    heads = attention.attributes.get_int("num_heads", 1)
    kv_heads = attention.attributes.get_int("kv_num_heads", heads)
    if num_columns * kv_heads != num_channels * heads:
        return None
    by_head = np.arange(num_channels).reshape(kv_heads, 1, -1)
    return Fold(readers, writers, np.tile(by_head, (1, heads // kv_heads, 1)).ravel())


def _rows(value: ir.Value | None, last_axis: int = -1) -> tuple[tuple[Rows, ...], int] | None:
    """Rows of the linear, and of its bias, that alone write a value read once; and how many there are."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    start, stop, node = 0, None, value.producer()
    while node is not None and node.op_type == "Slice":
        bounds = _slice(node, last_axis)
        if bounds is None:
            return None
        first, last = bounds
        stop = start + last if stop is None else min(stop, start + last)
        start += first
        value, node = node.inputs[0], None if node.inputs[0] is None else node.inputs[0].producer()
    assert value is not None
    names: list[str] = []
    if node is not None and node.op_type == "Add":
        bias = next((i for i in node.inputs if i is not None and _is_own(i) and _length(i)), None)
        product = next((i for i in node.inputs if i is not None and i is not bias), None)
        if bias is None or product is None or len(product.uses()) != 1:
            return None
        names.append(str(bias.name))
        node = product.producer()
    if node is None or not is_linear(node) or (weight := node.inputs[1]) is None or weight.shape is None:
        return None
    if len(weight.uses()) != 1 or weight.const_value is not None:
        return None
    num_rows = int(weight.shape.numpy()[0])
    stop = num_rows if stop is None else min(stop, num_rows)
    return tuple(Rows(name, start) for name in (str(weight.name), *names)), stop - start


def _slice(node: ir.Node, last_axis: int) -> tuple[int, int] | None:
    """First and last of a slice of columns; (0, all) for one of another axis that keeps all; None for any other."""
    constants = [None if value is None else _constant(value) for value in node.inputs[1:]]
    if len(constants) < 3 or any(constant is None or constant.size != 1 for constant in constants):
        return None
    start, stop, axis, *step = (int(constant.ravel()[0]) for constant in constants if constant is not None)
    if step not in ([], [1]) or start < 0 or stop < 0:
        return None
    if axis in (-1, last_axis):
        return start, stop
    return (0, 2**62) if start == 0 and stop >= 2**31 - 1 else None


def _constant(value: ir.Value) -> npt.NDArray[np.int64] | None:
    node = value.producer()
    if value.const_value is not None:
        return value.const_value.numpy()
    if node is None or node.op_type != "Constant":
        return None
    (attribute,) = node.attributes.values()
    return attribute.as_tensor().numpy() if attribute.name == "value" else np.array(attribute.value, np.int64)


def _is_own(value: ir.Value | None) -> bool:
    """True for an initializer that is used once and is not shared."""
    return value is not None and value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_input()


def _length(value: ir.Value | None) -> int:
    """Of a vector; 0 for anything else."""
    shape = None if value is None or value.shape is None else value.shape.numpy()
    return int(shape[0]) if shape is not None and len(shape) == 1 else 0
