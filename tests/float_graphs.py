"""Small float graphs by the conventions that quant relies on, and sources of weights for them."""

from collections.abc import Hashable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

F32, F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


class ArraySource:
    """A WeightSource over arrays in memory that notes the largest read."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.largest = 0

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self.arrays[parameter].shape

    def origin(self, parameter: str) -> Hashable:
        return (self, parameter)

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        rows = self.arrays[parameter][start:stop].astype(np.float32)
        self.largest = max(self.largest, rows.nbytes)
        return rows


def parameter(name: str, shape: tuple[int, ...], dtype: ir.DataType = F32) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _node(
    op: str, inputs: list, name: str, shape: tuple, dtype: ir.DataType, domain: str = "", **attributes
) -> ir.Node:
    node = ir.node(op, inputs, attributes, domain=domain, name=f"{name}_node")
    node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(shape)
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def _model(inputs: list, nodes: list, initializers: list) -> ir.Model:
    opsets = {"": 23, "com.microsoft": 1}
    outputs = [nodes[-1].outputs[0]]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="graph")
    return ir.Model(graph, ir_version=10)


def decoder(shapes: dict[str, tuple[int, int]], dtype: ir.DataType = F32) -> ir.Model:
    """x [rows, K] -> a chain of linears `<name>` [N, K] with a bias each, scaled by a constant of the graph."""
    width = next(iter(shapes.values()))[1]
    x = ir.Value(name="x", shape=ir.Shape(("rows", width)), type=ir.TensorType(dtype))
    constant = ir.Value(name="scale", shape=ir.Shape((1,)), type=ir.TensorType(dtype))
    constant.const_value = ir.Tensor(np.ones(1, dtype.numpy()), name="scale")
    nodes, initializers = [_node("Mul", [x, constant], "scaled", ("rows", width), dtype)], [constant]
    for name, (num_rows, num_columns) in shapes.items():
        weight = parameter(name, (num_rows, num_columns), dtype)
        bias = parameter(name.replace("weight", "bias"), (num_rows,), dtype)
        initializers += [weight, bias]
        shape = ("rows", num_rows)
        last = nodes[-1].outputs[0]
        nodes.append(_node("FusedMatMul", [last, weight], f"{name}_out", shape, dtype, "com.microsoft", transB=1))
        nodes.append(_node("Add", [nodes[-1].outputs[0], bias], f"{name}_sum", shape, dtype))
    return _model([x], nodes, initializers)


def normed(norm: str, shapes: dict[str, tuple[int, int]]) -> ir.Model:
    """x [rows, K] -> a norm with a weight (and a bias, if it is a LayerNormalization) -> the sum of linears [N, K]."""
    num_rows, width = next(iter(shapes.values()))
    x = ir.Value(name="x", shape=ir.Shape(("rows", width)), type=ir.TensorType(F32))
    initializers = [parameter("norm.weight", (width,))]
    if norm == "LayerNormalization":
        initializers.append(parameter("norm.bias", (width,)))
    nodes = [_node(norm, [x, *initializers], "normed", ("rows", width), F32, axis=-1, epsilon=1e-6)]
    out = ("rows", num_rows)
    results = []
    for name, shape in shapes.items():
        weight = parameter(name, shape)
        initializers.append(weight)
        linear = _node("FusedMatMul", [nodes[0].outputs[0], weight], f"{name}_out", out, F32, "com.microsoft", transB=1)
        nodes.append(linear)
        results.append(linear.outputs[0])
    nodes.append(_node("Sum", results, "total", out, F32))
    return _model([x], nodes, initializers)


def embedding(num_rows: int, num_columns: int, dtype: ir.DataType = F32) -> ir.Model:
    """ids [n] -> embed_tokens.weight[ids]."""
    ids = ir.Value(name="ids", shape=ir.Shape(("n",)), type=ir.TensorType(ir.DataType.INT64))
    table = parameter("embed_tokens.weight", (num_rows, num_columns), dtype)
    node = _node("Gather", [table, ids], "inputs_embeds", ("n", num_columns), dtype, axis=0)
    return _model([ids], [node], [table])


def random_source(model: ir.Model, seed: int = 0) -> ArraySource:
    """Normal values for every parameter of a model."""
    random = np.random.default_rng(seed)
    values = [value for value in model.graph.initializers.values() if value.const_value is None]
    return ArraySource({v.name: random.standard_normal(v.shape.numpy()).astype(np.float32) for v in values})


def run(path: Path, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
