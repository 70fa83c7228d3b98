"""Models whose graphs come from several variants, and graphs whose activations are not rounded: what a waterfall swaps.

`float_activations` gives a graph of the same stored weights that computes in float: each quantized linear becomes one
on its weights as they read back. What is then left between it and the graph itself is what its kernels do to
activations. Dims: N outputs, K inputs, B blocks a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..quant.dynamic import dequantize_channels
from ..runtime.model import Model
from ..runtime.opened import LoadOptions
from ..runtime.package import Package
from ..runtime.session import GraphSession, open_session

__all__ = ["MixedModel", "float_activations"]

Array = NDArray[Any]
_DATA = "weights.data"


class MixedModel(Model):
    """A model whose roles run the graphs of `graphs` in place of its variant's own. Sessions are shared by `pool`."""

    def __init__(
        self,
        package: Package,
        variant: str,
        graphs: Mapping[str, Path],
        pool: dict[Path, GraphSession],
        video_rule: str | None,
    ) -> None:
        super().__init__(package, variant, LoadOptions(video_rule=video_rule))
        self._graphs, self._pool = graphs, pool

    def session(self, role: str) -> GraphSession:
        path = self._graphs.get(role) or self.package.graph_path(role, self.variant.name)
        if path not in self._pool:
            self._pool[path] = open_session(path, self.manifest.target)
        return self._pool[path]


def float_activations(graph: Path, folder: Path) -> Path | None:
    """A copy of a graph in `folder` whose quantized linears compute in float32; None where it has none of them.

    It takes the disk of the float32 weights, until the folder is removed.
    """
    model = onnx.load(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    replaced = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "IntegerLinear")]
    if not replaced:
        return None
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeTokens"}
    for node in replaced:
        is_blocks = node.op_type == "MatMulNBits"
        matrix = _blocks(node, weights) if is_blocks else _channels(node, weights)
        stored = node.input[1 if is_blocks else 2]
        name = f"{stored}_float32"
        if name not in weights:
            weights[name] = onnx.numpy_helper.from_array(matrix, name)
        x, y = node.input[0], node.output[0]
        node.CopyFrom(
            helper.make_node(
                "FusedMatMul", [x if is_blocks else rounded[x], name], [y], domain="com.microsoft", transB=1
            )
        )
    nodes = [node for node in model.graph.node if node.op_type != "QuantizeTokens"]
    used = {name for node in nodes for name in node.input}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    _declare_microsoft(model)
    file = folder / graph.name
    onnx.save(model, file, save_as_external_data=True, location=f"{graph.stem}.{_DATA}", size_threshold=1024)
    return file


def _blocks(node: NodeProto, weights: Mapping[str, TensorProto]) -> Array:
    """What the codes of a MatMulNBits stand for, float32 [N, K]."""
    number = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits, size = (number[name] for name in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // size)
    arrays = [onnx.numpy_helper.to_array(weights[name]) if name else None for name in node.input[1:4]]
    codes, scales, zeros = (*arrays, None)[:3]
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


def _channels(node: NodeProto, weights: Mapping[str, TensorProto]) -> Array:
    """What the codes of an IntegerLinear stand for, float32 [N, K]."""
    codes_KN, scales_N = (onnx.numpy_helper.to_array(weights[name]) for name in node.input[2:4])
    return np.ascontiguousarray(dequantize_channels(codes_KN.T, scales_N))


def _declare_microsoft(model: ModelProto) -> None:
    if all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
