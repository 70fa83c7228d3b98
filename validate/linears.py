"""Quantized linears of a graph as the float ones that they stand for: what their codes read back as.

Dims: N outputs, K inputs, B blocks a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..quant.dynamic import dequantize_channels
from ..quant.rewrite import is_linear

__all__ = ["QuantizedLinear", "float_linear", "float_structure", "quantized_linears", "read_back"]

Array = NDArray[Any]
_STORED = "_Q"  # behind a parameter's name, where its codes are


@dataclass(frozen=True)
class QuantizedLinear:
    """A node on codes. `value` is what it computes with, before its activations are rounded."""

    node: NodeProto
    value: str
    codes: str  # initializer
    shape: tuple[int, int]  # N, K

    @property
    def parameter(self) -> str:
        """The weight's name in the float graph."""
        return self.codes.removesuffix(_STORED)


def quantized_linears(graph: GraphProto) -> tuple[QuantizedLinear, ...]:
    """Linears in blocks or by channels whose codes are initializers, in graph order."""
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeTokens"}
    found: list[QuantizedLinear] = []
    for node in graph.node:
        if node.op_type == "MatMulNBits" and all(name in dims for name in node.input[1:4] if name):
            number = {attribute.name: attribute.i for attribute in node.attribute}
            found.append(QuantizedLinear(node, node.input[0], node.input[1], (number["N"], number["K"])))
        elif node.op_type == "IntegerLinear" and all(name in dims for name in node.input[2:4]):
            columns, rows = dims[node.input[2]]
            found.append(QuantizedLinear(node, rounded[node.input[0]], node.input[2], (rows, columns)))
    return tuple(found)


def float_linear(linear: QuantizedLinear, weight: str) -> NodeProto:
    """The node that computes the same on `weight`, float32 [N, K]."""
    inputs, outputs = [linear.value, weight], [linear.node.output[0]]
    return helper.make_node("FusedMatMul", inputs, outputs, domain="com.microsoft", transB=1)


def read_back(linear: QuantizedLinear, weights: Mapping[str, TensorProto], folder: Path | None = None) -> Array:
    """What the codes stand for, float32 [N, K]. `folder` has external data that are not loaded."""
    names = linear.node.input[1:4] if linear.node.op_type == "MatMulNBits" else linear.node.input[2:4]
    base = "" if folder is None else str(folder)
    arrays = [onnx.numpy_helper.to_array(weights[name], base) if name else None for name in names]
    if linear.node.op_type == "MatMulNBits":
        return _blocks(linear, *(*arrays, None)[:3])
    codes_KN, scales_N = arrays
    assert codes_KN is not None
    assert scales_N is not None
    return np.ascontiguousarray(dequantize_channels(codes_KN.T, scales_N))


def float_structure(model: ModelProto) -> ir.Graph:
    """The graph with float linears whose weights have names and shapes, and no values: to be looked at, not run."""
    graph = model.graph
    linears = {id(linear.node): linear for linear in quantized_linears(graph)}
    held = {tensor.name for tensor in graph.initializer}
    cast = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Cast" and n.input[0] in held}
    made = ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    for node in graph.node:
        if node.op_type == "QuantizeTokens":
            continue
        linear = linears.get(id(node))
        made.graph.node.append(node if linear is None else float_linear(linear, linear.parameter))
        for index, name in enumerate(node.input if linear is None else ()):
            made.graph.node[-1].input[index] = cast.get(name, name)
    for linear in {linear.parameter: linear for linear in linears.values()}.values():
        tensor = TensorProto(name=linear.parameter, dims=linear.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="none")
        made.graph.initializer.append(tensor)
    found = ir.from_proto(made).graph
    for node in found:
        if is_linear(node) and (weight := node.inputs[1]) is not None:
            weight.const_value = None  # as in a graph whose weights are still in the checkpoint
    return found


def _blocks(linear: QuantizedLinear, codes: Array | None, scales: Array | None, zeros: Array | None) -> Array:
    number = {attribute.name: attribute.i for attribute in linear.node.attribute}
    (rows, columns), bits, size = linear.shape, number["bits"], number["block_size"]
    blocks = -(-columns // size)
    assert codes is not None
    assert scales is not None
    codes_NBS = _codes(codes.reshape(rows, -1), bits).reshape(rows, blocks, size).astype(np.float32)
    middle = np.float32(1 << (bits - 1))
    zeros_NB1 = middle if zeros is None else _codes(zeros.reshape(rows, -1), bits)[:, :blocks, None].astype(np.float32)
    values = (codes_NBS - zeros_NB1) * scales.reshape(rows, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :columns], np.float32)


def _codes(packed: Array, bits: int) -> Array:
    """Codes of `bits`, the first in the lowest bits of a byte: [N, bytes] -> [N, bytes * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)
