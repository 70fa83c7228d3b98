"""Faults planted into a package: each changes one operator of one graph, as a slip in an exporter would."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from vlmport.runtime.package import file_entry

Change = Callable[[ModelProto, Path], None]  # a graph in place, and the folder of its weights

__all__ = ["FAULTS", "Fault", "plant"]


@dataclass(frozen=True)
class Fault:
    """What is done to the graph of a role, and where it has to be found."""

    name: str
    role: str
    change: Change
    layer: int | None
    found: str  # name of the operator that is told


def plant(package: Path, folder: Path, fault: Fault, variant: str) -> Path:
    """A copy of the package with the fault in the variant's graph; every other file is a link to the same bytes."""
    copy = folder / fault.name.replace(" ", "_")
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("parity"))
    manifest = json.loads((copy / "vlmport.json").read_text())
    graph = copy / "onnx" / manifest["variants"][variant]["graphs"][fault.role]["graph"]
    model = onnx.load(graph, load_external_data=False)
    before = model.SerializeToString()
    fault.change(model, graph.parent)
    assert model.SerializeToString() != before, f"{fault.name} changed nothing"
    onnx.save(model, graph)
    entry = file_entry(graph)
    manifest["files"][f"onnx/{graph.name}"] = {"sha256": entry.sha256, "size": entry.size}
    (copy / "vlmport.json").write_text(json.dumps(manifest))
    return copy


def _reader(model: ModelProto, weight: str) -> NodeProto:
    return next(node for node in model.graph.node if weight in node.input)


def _before(model: ModelProto, node: NodeProto, index: int, new: NodeProto) -> None:
    """Puts a node in front of one input of another."""
    places = {id(n): i for i, n in enumerate(model.graph.node)}
    model.graph.node.insert(places[id(node)], new)
    node.input[index] = new.output[0]


def _values(model: ModelProto, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def noise(weight: str, size: float) -> Change:
    """A weight [N, K] plus noise, `size` times its own spread."""

    def change(model: ModelProto, folder: Path) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == weight)
        array = numpy_helper.to_array(tensor, str(folder))
        moved = array + size * array.std() * np.random.default_rng(0).standard_normal(array.shape)
        tensor.CopyFrom(numpy_helper.from_array(moved.astype(array.dtype), weight))

    return change


def eps(norm: str, value: float) -> Change:
    """Another epsilon of a norm."""

    def change(model: ModelProto, folder: Path) -> None:
        for attribute in _reader(model, norm).attribute:
            if attribute.name == "epsilon":
                attribute.f = value

    return change


def swapped_heads(module: str, num_heads: int) -> Change:
    """The first two heads of a projection's result change places."""

    def change(model: ModelProto, folder: Path) -> None:
        node = _reader(model, f"{module}.weight")
        width = next(t for t in model.graph.initializer if t.name == f"{module}.weight").dims[0]
        order = np.arange(width).reshape(num_heads, -1)
        order[[0, 1]] = order[[1, 0]]
        _after(model, node, "Gather", [_values(model, "planted", order.reshape(-1))], {"axis": -1})

    return change


def _after(model: ModelProto, node: NodeProto, operator: str, others: list[str], attributes: dict[str, int]) -> None:
    places = {id(n): i for i, n in enumerate(model.graph.node)}
    result, node.output[0] = node.output[0], f"{node.output[0]}_planted"
    new = helper.make_node(operator, [node.output[0], *others], [result], **attributes)
    model.graph.node.insert(places[id(node)] + 1, new)


def shifted_position(model: ModelProto, folder: Path) -> None:
    """Every token but the first is one position too far. (All of them would be no fault: angles are relative.)"""
    node = next(n for n in model.graph.node if "position_ids" in n.input)
    sign = helper.make_node("Sign", ["position_ids"], ["planted_sign"])
    shifted = helper.make_node("Add", ["position_ids", "planted_sign"], ["planted_positions"])
    _before(model, node, 0, shifted)
    model.graph.node.insert(list(model.graph.node).index(shifted), sign)


def wrong_theta(model: ModelProto, folder: Path) -> None:
    """Rotary frequencies of theta 10000 squared in place of theta: each frequency is squared."""
    node = next(n for n in model.graph.node if n.op_type == "Constant" and _is_table(n))
    values = numpy_helper.to_array(node.attribute[0].t)
    node.attribute[0].t.CopyFrom(numpy_helper.from_array((values**2).astype(np.float32)))


def _is_table(node: NodeProto) -> bool:
    value = node.attribute[0]
    return value.name == "value" and value.t.data_type == TensorProto.FLOAT and list(value.t.dims) != []


def activation(before: str, operator: str) -> Change:
    """Another function in place of the sigmoid behind a gate."""

    def change(model: ModelProto, folder: Path) -> None:
        value = _last(model, before)
        node = next(n for n in model.graph.node if n.op_type == "Sigmoid" and n.input[0] == value)
        node.op_type = operator

    return change


def _last(model: ModelProto, module: str) -> str:
    """The value that a linear gives, its bias added."""
    value = _reader(model, f"{module}.weight").output[0]
    bias = [n for n in model.graph.node if f"{module}.bias" in n.input and value in n.input]
    return bias[0].output[0] if bias else value


def dropped_bias(module: str) -> Change:
    """The sum with the bias gives what went into it."""

    def change(model: ModelProto, folder: Path) -> None:
        node = _reader(model, f"{module}.bias")
        kept = next(name for name in node.input if name != f"{module}.bias")
        node.op_type = "Identity"
        del node.input[:]
        node.input.append(kept)

    return change


def other_segments(number: int) -> Change:
    """A block of windows attends over whole images."""

    def change(model: ModelProto, folder: Path) -> None:
        calls = [n for n in model.graph.node if n.op_type == "SegmentAttention"]
        assert calls[number].input[3] == "cu_window_seqlens"
        calls[number].input[3] = "cu_seqlens"

    return change


def scale(operator: str, number: int, factor: float) -> Change:
    """Scores of one attention by another factor."""

    def change(model: ModelProto, folder: Path) -> None:
        node = [n for n in model.graph.node if n.op_type == operator][number]
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f *= factor

    return change


def unordered_windows(model: ModelProto, folder: Path) -> None:
    """Merge blocks go into the tower in their own order, not by windows."""
    node = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == "view")
    node.op_type = "Identity"
    del node.input[1:], node.attribute[:]


def swapped_sections(model: ModelProto, folder: Path) -> None:
    """Cosine and sine change places in one layer's query rotation."""
    node = [n for n in model.graph.node if n.op_type == "RotaryEmbedding"][2]
    node.input[1], node.input[2] = node.input[2], node.input[1]


def shifted_rows(weight: str) -> Change:
    """Scales of a quantized weight belong to the next row."""

    def change(model: ModelProto, folder: Path) -> None:
        name = f"{weight}_scales"
        node = _reader(model, name)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        order = np.roll(np.arange(tensor.dims[0]), 1)
        index = list(node.input).index(name)
        new = helper.make_node("Gather", [name, _values(model, "planted", order)], ["planted_scales"], axis=0)
        _before(model, node, index, new)

    return change


FAULTS = (
    Fault("weight noise", "decoder", noise("layers.1.mlp.down_proj.weight", 0.01), 1, "layers.1.mlp.down_proj"),
    Fault("wrong eps", "decoder", eps("layers.1.input_layernorm.weight", 1e-4), 1, "layers.1.input_layernorm"),
    Fault("swapped heads", "decoder", swapped_heads("layers.1.self_attn.q_proj", 4), 1, "layers.1.self_attn.q_proj"),
    Fault("off-by-one position", "decoder", shifted_position, 0, "present.0.key"),
    Fault("wrong theta", "decoder", wrong_theta, 0, "present.0.key"),
    Fault("swapped rotary tables", "decoder", swapped_sections, 1, "layers.1.self_attn.o_proj input"),
    Fault("dropped bias", "decoder", dropped_bias("layers.0.self_attn.k_proj"), 0, "layers.0.self_attn.k_proj"),
    Fault("wrong scale", "decoder", scale("GroupQueryAttention", 1, 1.1), 1, "layers.1.self_attn.o_proj input"),
    Fault(
        "wrong activation", "decoder", activation("layers.0.mlp.gate_proj", "Tanh"), 0, "layers.0.mlp.down_proj input"
    ),
    Fault(
        "tower activation",
        "vision_encoder",
        activation("blocks.2.mlp.gate_proj", "Tanh"),
        2,
        "blocks.2.mlp.down_proj input",
    ),
    Fault("tower noise", "vision_encoder", noise("blocks.1.attn.proj.weight", 0.01), 1, "blocks.1.attn.proj"),
    Fault("tower bias", "vision_encoder", dropped_bias("blocks.2.attn.qkv"), 2, "blocks.2.attn.qkv"),
    Fault("full attention for windows", "vision_encoder", other_segments(0), 0, "blocks.0.attn.proj input"),
    Fault("window order", "vision_encoder", unordered_windows, None, "blocks.0.norm1 input"),
    Fault("tower eps", "vision_encoder", eps("blocks.1.norm2.weight", 1e-4), 1, "blocks.1.norm2"),
    Fault("projector noise", "projector", noise("mlp.2.weight", 0.01), 2, "mlp.2"),
)
QUANTIZED = Fault(
    "shifted scales", "decoder", shifted_rows("layers.1.self_attn.o_proj.weight"), 1, "layers.1.self_attn.o_proj"
)
