"""Models whose graphs come from several variants, and graphs with less rounding in them: what a waterfall swaps.

`float_activations` gives a graph of the same stored weights that computes in float: each quantized linear becomes one
on its weights as they read back. What is then left between it and the graph itself is what its kernels do to
activations. `float_cache` gives a decoder that keeps keys and values as floats.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.external_data_helper
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from ..runtime.model import Model
from ..runtime.opened import LoadOptions
from ..runtime.package import Package
from ..runtime.session import GraphSession, open_session
from .linears import QuantizedLinear, float_linear, quantized_linears, read_back

__all__ = ["MixedModel", "Opener", "float_activations", "float_cache", "float_type", "save_graph"]

Array = NDArray[Any]
Opener = Callable[[Path], GraphSession]
_DATA = "weights.data"
_CACHE_ATTRIBUTES = {"k_quant_type", "v_quant_type", "kv_cache_bit_width"}  # of an attention on codes
_NUM_SCALES = 2  # its last inputs


class MixedModel(Model):
    """A model whose roles run the graphs of `graphs` in place of its variant's own. Sessions are shared by `pool`.

    `open_graph` opens those that are not in it yet; None: as the package's target says.
    """

    def __init__(
        self,
        package: Package,
        variant: str,
        graphs: Mapping[str, Path],
        pool: dict[Path, GraphSession],
        video_rule: str | None,
        open_graph: Opener | None = None,
    ) -> None:
        super().__init__(package, variant, LoadOptions(video_rule=video_rule))
        self._graphs, self._pool = graphs, pool
        self._open = open_graph or (lambda path: open_session(path, package.manifest.target))

    def session(self, role: str) -> GraphSession:
        path = self._graphs.get(role) or self.package.graph_path(role, self.variant.name)
        if path not in self._pool:
            self._pool[path] = self._open(path)
        return self._pool[path]


def float_activations(graph: Path, folder: Path) -> Path | None:
    """A copy of a graph in `folder` whose quantized linears compute in floats; None where it has none of them.

    In float32, or in float16 where the graph computes in that. It takes their disk until the folder is removed.
    """
    model = onnx.load(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    linears = quantized_linears(model.graph)
    if not linears:
        return None
    for linear in linears:
        name = f"{linear.codes}_float32"
        if name not in weights:
            weights[name] = onnx.numpy_helper.from_array(
                read_back(linear, weights).astype(float_type(linear, weights)), name
            )
        linear.node.CopyFrom(float_linear(linear, name))
    return save_graph(model, weights, folder / graph.name)


def float_cache(graph: Path, folder: Path) -> Path | None:
    """A copy of a decoder in `folder` whose cache is of floats; None where it is so already."""
    model = onnx.load(graph)
    rounded: set[str] = set()
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name not in _CACHE_ATTRIBUTES]
        if len(kept) == len(node.attribute):
            continue
        del node.attribute[:], node.input[-_NUM_SCALES:]
        node.attribute.extend(kept)
        while not node.input[-1]:
            del node.input[-1]
        rounded |= {*node.input[3:5], *node.output[1:3]}
    if not rounded:
        return None
    for value in (*model.graph.input, *model.graph.output):
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return save_graph(model, weights, folder / f"float_cache_{graph.name}")


def float_type(linear: QuantizedLinear, weights: Mapping[str, TensorProto]) -> Any:
    """The dtype that a quantized linear's graph computes in: that of its scales."""
    scales = weights[linear.node.input[2 if linear.node.op_type == "MatMulNBits" else 3]]
    return helper.tensor_dtype_to_np_dtype(scales.data_type)


def save_graph(model: ModelProto, weights: Mapping[str, TensorProto], file: Path) -> Path:
    """Writes a graph whose nodes were replaced, with those of `weights` that it reads. Returns the file."""
    read = {name for node in model.graph.node if node.op_type != "QuantizeTokens" for name in node.input}
    nodes = [node for node in model.graph.node if node.op_type != "QuantizeTokens" or read.intersection(node.output)]
    used = {name for node in nodes for name in node.input}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    if all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, file, save_as_external_data=True, location=f"{file.stem}.{_DATA}", size_threshold=1024)
    return file
