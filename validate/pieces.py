"""Runs a graph a piece at a time, so that a package can be checked on a box that could not load it whole.

A graph is cut between nodes where its weights reach a budget. Each piece is a graph of its own on the same data file;
it is loaded, run once and let go before the next one. S prompt tokens, D width, N tokens after them, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..runtime.cache import cache_names
from ..runtime.model import Model
from ..runtime.opened import LoadOptions
from ..runtime.package import Package
from ..runtime.prepare import Prepared
from ..runtime.routing import routing_inputs
from ..runtime.session import GraphSession, require_onnxruntime
from .points import read_names

__all__ = ["PIECE_BYTES", "PiecedGraph", "PiecedModel", "logits_in_pieces"]

PIECE_BYTES = 256 << 20  # weights of a piece; ONNX Runtime takes up to three times as much while it packs them
_ERRORS_ONLY = 3
_FOLDER = "session.model_external_initializers_file_folder_path"
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "tensor(float)",
    TensorProto.FLOAT16: "tensor(float16)",
    TensorProto.INT8: "tensor(int8)",
    TensorProto.INT64: "tensor(int64)",
    TensorProto.INT32: "tensor(int32)",
}

Array = NDArray[Any]


@dataclass(frozen=True)
class _Port:
    """What ONNX Runtime tells of an input or output."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class PiecedModel(Model):
    """A model whose graphs are run in pieces: for one call of each role, as every call loads all weights again."""

    def __init__(self, package: Package, variant: str) -> None:
        super().__init__(package, variant, LoadOptions())

    def session(self, role: str) -> GraphSession:
        path = self.package.graph_path(role, self.variant.name)
        return GraphSession(PiecedGraph.open(path), path, "cpu")


def logits_in_pieces(model: PiecedModel, prepared: Prepared, embeds_SD: Array, ids: Sequence[int]) -> Array:
    """float32 [1 + N, V]: after the prompt, and after each of the N `ids` put behind it; one call without a cache."""
    spec = model.cache_spec
    answer = model.session("embed_tokens").run({"input_ids": np.array([ids], np.int64)}, ["inputs_embeds"])
    seen_SD, positions = prepared.seen(embeds_SD), prepared.seen_positions
    steps = np.arange(len(seen_SD), len(seen_SD) + len(ids)) + prepared.rope_delta
    positions = np.concatenate([positions, np.broadcast_to(steps, (*positions.shape[:-1], len(ids)))], axis=-1)
    empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), spec.dtype)
    feeds = {past: empty for past, _ in cache_names(spec.num_layers)} | {
        "inputs_embeds": np.concatenate([seen_SD, answer["inputs_embeds"][0]])[None],
        "attention_mask": np.ones((1, positions.shape[-1]), np.int64),
        "position_ids": np.expand_dims(positions, -2),  # [3, 1, S] or [1, S]
        "num_logits_to_keep": np.array([1 + len(ids)], np.int64),
    }
    session = model.session("decoder")
    visual = np.append(prepared.seen(prepared.visual_tokens), np.zeros(len(ids), bool))
    feeds |= {name: array for name, array in routing_inputs(visual).items() if name in session.inputs}
    return session.run(feeds, ["logits"])["logits"][0].astype(np.float32, copy=False)


class PiecedGraph:
    """What a GraphSession needs of an onnxruntime.InferenceSession, on the CPU; any value can be asked for."""

    def __init__(self, model: ModelProto, folder: Path, budget: int = PIECE_BYTES) -> None:
        """folder: where the external data of the model is."""
        self._folder = folder
        self.model = model
        self._budget = budget

    @classmethod
    def open(cls, path: Path, budget: int = PIECE_BYTES) -> "PiecedGraph":
        return cls(onnx.load(path, load_external_data=False), path.parent, budget)

    def get_inputs(self) -> list[_Port]:
        held = {tensor.name for tensor in self.model.graph.initializer}
        return [_port(value) for value in self.model.graph.input if value.name not in held]

    def get_overridable_initializers(self) -> list[_Port]:
        held = {tensor.name for tensor in self.model.graph.initializer}
        return [_port(value) for value in self.model.graph.input if value.name in held]

    def get_outputs(self) -> list[_Port]:
        return [_port(value) for value in self.model.graph.output]

    def run(self, names: Sequence[str], feeds: Mapping[str, Array], options: Any = None) -> list[Array]:
        """The named outputs. `options` is for the protocol's sake: nothing is kept that it could release."""
        values = dict(feeds)
        pieces = list(_cut(self.model.graph, self._budget))
        used = [{name for node in nodes for name in read_names(node)} for nodes in pieces]
        for number, nodes in enumerate(pieces):
            later = {*names, *(name for rest in used[number + 1 :] for name in rest)}
            made = [name for node in nodes for name in node.output if name in later]
            piece = _piece(self.model, nodes, used[number], values, made)
            values |= self._run_piece(piece, {name: values[name] for name in used[number] if name in values}, made)
            values = {name: value for name, value in values.items() if name in later}
        return [values[name] for name in names]

    def _run_piece(self, piece: ModelProto, feeds: dict[str, Array], names: list[str]) -> dict[str, Array]:
        ort = require_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry(_FOLDER, str(self._folder))
        session = ort.InferenceSession(piece.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, feeds), strict=True))


def _port(value: onnx.ValueInfoProto) -> _Port:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return _Port(value.name, _TYPES[tensor.elem_type], shape)


def _cut(graph: GraphProto, budget: int) -> Iterator[list[NodeProto]]:
    """The nodes in order, in pieces whose weights together are within the budget, as far as single weights allow."""
    left = {tensor.name: _num_bytes(tensor) for tensor in graph.initializer}
    piece: list[NodeProto] = []
    num_bytes = 0
    for node in graph.node:
        more = sum(left.pop(name, 0) for name in read_names(node))
        if piece and num_bytes + more > budget:
            yield piece
            piece, num_bytes = [], 0
        piece.append(node)
        num_bytes += more
    yield piece


def _num_bytes(tensor: TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)


def _piece(
    model: ModelProto, nodes: list[NodeProto], used: set[str], values: Mapping[str, Array], made: list[str]
) -> ModelProto:
    """A model of some nodes. `values` are known when it runs; `made` is what it shall give."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(values[name]).dtype), None)
        for name in sorted(used)
        if name in values
    ]
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used and tensor.name not in values]
    outputs = [onnx.ValueInfoProto(name=name) for name in made]
    graph = helper.make_graph(nodes, model.graph.name, inputs, outputs, initializers)
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
