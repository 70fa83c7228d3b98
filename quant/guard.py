"""Keeps in float32 what float16 cannot take, in graphs that compute in float16.

An operator computes in float32 where a value that it reads or writes went beyond the limit on calibration data, or may
have gone by the bounds of quant/ranges.py: the smallest set there is, with Casts around it. Floats of its weights are
stored in float32 too; codes stay codes, with scales in float32. Attentions have float16 kernels alone: what they read
is divided by a power of two, exactly, which the scale of the scores or a product behind them makes up for.
"""

import base64
import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..runtime.errors import RecipeError
from ..runtime.manifest import RangeRecord
from .ranges import Ranges, headroom, module_of, value_ranges
from .recipe import RangeGuard
from .typed import typed

__all__ = ["LARGEST", "Guard"]

LARGEST = 65504.0  # of float16
_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_BIAS = "Add"
_ATTENTIONS = ("GroupQueryAttention", "PackedMultiHeadAttention")
_VALUE, _PAST = 2, 3  # inputs of an attention: its third, and where the cache begins
_ON_THE_WAY = {"Cast", "Reshape", "RotaryEmbedding", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


class Guard:
    """Goes over the roles of a variant, and keeps a record of what it did."""

    def __init__(self, rule: RangeGuard) -> None:
        self._limit = LARGEST / rule.margin
        self._exceeded: dict[str, float] = {}
        self._weights: list[str] = []
        self._num_operators = 0

    def record(self) -> RangeRecord:
        """What the manifest says about it."""
        exceeded = {name: float(f"{size:.4g}") for name, size in sorted(self._exceeded.items())}
        return RangeRecord(self._limit, exceeded, tuple(self._weights), self._num_operators)

    def widen(self, model: ir.Model, role: str, ranges: Ranges | None) -> set[str] | None:
        """Changes the float graph of a role in place, where anything in it is beyond the limit.

        Gives the weights that are computed with in float32, or None where nothing had to change. Raises RecipeError
        where no sample tells of a part of the role.
        """
        _set_types(model)
        ranges = ranges or Ranges()
        sizes = value_ranges(model.graph, ranges)
        values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
        halves = [value for value in values if value.dtype == _HALF]
        _check_known(role, halves, sizes)
        wide = {value for value in halves if sizes.get(value, 0.0) > (LARGEST if _is_given(value) else self._limit)}
        seen = {f"{role}/{_name(value)}": sizes[value] for value in sorted(wide, key=lambda value: sizes[value])}
        for node in model.graph:
            name = module_of(node) if "MatMul" in node.op_type else None
            for sizes_of, way in ((ranges.reads, "input"), (ranges.writes, "output")):
                if name is not None and sizes_of.get(name, 0.0) > self._limit:
                    wide |= _around(node)
                    seen[f"{role}/{name.removesuffix('.weight')} {way}"] = sizes_of[name]
        operators = [node for node in model.graph if _is_in(node, wide)]
        self._exceeded |= seen
        weights = {name for node in operators if (name := module_of(node)) is not None}
        widening = _Widening(model, wide, operators)
        for node in operators:
            if node.op_type in _ATTENTIONS:
                widening.rescale(node, sizes, self._limit)
            else:
                widening.widen(node)
        self._weights += sorted(f"{role}/{name}" for name in weights)
        self._num_operators += len(operators)
        return weights if operators else None


def _is_given(value: ir.Value) -> bool:
    """True for what a checkpoint holds: it does not grow with other inputs, so it needs no margin."""
    return value.is_initializer()


def _set_types(model: ir.Model) -> None:
    """Values that no dtype is known of get theirs."""
    known = {value.name: value.type for node in typed(model).graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.type is None:
                value.type = known.get(value.name)


def _is_in(node: ir.Node, wide: set[ir.Value]) -> bool:
    """Whether an operator has to compute in float32. A norm reads it as it is, and a Cast is told elsewhere."""
    if node.op_type == "RMSNormalization":
        return not wide.isdisjoint((*node.inputs[1:], *node.outputs))
    if node.op_type == "Shape":
        return False
    if node.op_type == "Cast":
        return node.outputs[0] in wide
    return not wide.isdisjoint((*node.inputs, *node.outputs))


def _check_known(role: str, halves: Iterable[ir.Value], sizes: Mapping[ir.Value, float]) -> None:
    for value in halves:
        if not _is_given(value) and value not in sizes:
            raise RecipeError(
                f"{role}: no sample of the calibration data goes through {_name(value).rpartition(' ')[0]}, so nothing "
                "is known of its range; add samples with images"
            )


def _around(linear: ir.Node) -> set[ir.Value]:
    """What a linear writes, and what it reads where that was made smaller for it alone (the residual stream is)."""
    found = {value for value in linear.outputs if value.dtype == _HALF}
    x = linear.inputs[0]
    if x is not None and x.dtype == _HALF and headroom(linear) != 1:
        found.add(x)
    return found


def _name(value: ir.Value) -> str:
    """For people: "layers.3.mlp.down_proj output", or the name of an operator that is none of a module."""
    node = value.producer()
    if node is None:
        return str(value.name)
    written: ir.Node | None = node
    while written is not None and (written.op_type in _ON_THE_WAY or _adds_bias(written)):
        written = written.inputs[0].producer() if written.inputs[0] is not None else None
    if (name := module_of(written)) is not None:
        return f"{name.removesuffix('.weight')} output"
    for use in value.uses():
        if use.idx == 0 and (name := module_of(use.node)) is not None:
            return f"{name.removesuffix('.weight')} input"
    return f"{node.op_type} {value.name}"


def _adds_bias(node: ir.Node) -> bool:
    return node.op_type == "Add" and node.inputs[1] is not None and node.inputs[1].is_initializer()


class _Widening:
    """Puts operators into float32, one after another; values in `wide` are float32 between them."""

    def __init__(self, model: ir.Model, wide: set[ir.Value], operators: list[ir.Node]) -> None:
        self._model, self._graph, self._wide, self._operators = model, model.graph, wide, set(operators)
        self._casts: dict[ir.Value, ir.Value] = {}

    def widen(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", _SINGLE)
        else:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == _HALF:
                    node.replace_input_with(index, self._single(value, node))
        for value in node.outputs:
            if value.dtype == _HALF:
                self._set_single(value)
                if value not in self._wide:
                    self._narrow(value, node)

    def rescale(self, attention: ir.Node, sizes: Mapping[ir.Value, float], limit: float) -> None:
        """Brings what an attention reads into range. Whoever looks into its cache finds the factor in the metadata."""
        out = attention.outputs[0]
        for index in range(_VALUE + 1):
            value = attention.inputs[index]
            if value is None or value not in self._wide:
                continue
            factor = 2.0 ** math.ceil(math.log2(sizes[value] / limit))
            smaller = _product(value, 1 / factor, _HALF)
            self._graph.insert_before(attention, smaller)
            attention.replace_input_with(index, smaller[-1].outputs[0])
            if index == _VALUE:
                readers = list(out.uses())
                larger = _product(out, factor, _SINGLE if out in self._wide else _HALF)
                self._graph.insert_after(attention, larger)
                for use in readers:
                    use.node.replace_input_with(use.idx, larger[-1].outputs[0])
            else:
                scale = attention.attributes["scale"].as_float()
                attention.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
            past = attention.inputs[_PAST + index - 1] if attention.op_type == _ATTENTIONS[0] and index > 0 else None
            if past is not None:
                self._model.metadata_props[f"{past.name}.scale"] = base64.b64encode(
                    np.float32(factor).tobytes()
                ).decode()

    def _single(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The same value in float32."""
        users = {use.node for use in value.uses()}
        if value.is_initializer() and not value.is_graph_input() and users <= self._operators:
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            self._set_single(value)
            return value
        if value not in self._casts:
            cast = ir.node("Cast", [value], {"to": _SINGLE})
            cast.outputs[0].type = ir.TensorType(_SINGLE)
            self._graph.insert_before(before, cast)
            self._casts[value] = cast.outputs[0]
        return self._casts[value]

    def _narrow(self, value: ir.Value, node: ir.Node) -> None:
        """Others read the result in float16, for it is in range."""
        cast = ir.node("Cast", [value], {"to": _HALF})
        cast.outputs[0].type = ir.TensorType(_HALF)
        self._graph.insert_after(node, cast)
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, value)

    def _set_single(self, value: ir.Value) -> None:
        value.type = ir.TensorType(_SINGLE)  # not value.dtype: values may share the object


def _product(value: ir.Value, factor: float, dtype: ir.DataType) -> list[ir.Node]:
    """Nodes that give value * factor, computed in float32."""
    constant = ir.node("Constant", [], {"value": ir.tensor([factor], dtype=_SINGLE)})
    single = ir.node("Cast", [value], {"to": _SINGLE})
    product = ir.node("Mul", [single.outputs[0], constant.outputs[0]])
    result = ir.node("Cast", [product.outputs[0]], {"to": dtype})
    for node in (constant, single, product, result):
        node.outputs[0].type = ir.TensorType(dtype if node is result else _SINGLE)
    return [constant, single, product, result]
