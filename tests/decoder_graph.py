"""A decoder small enough to build by hand, with the inputs and outputs of a real one, and the same in numpy.

S  tokens   D  hidden size 8   H  heads 2   K  key/value heads 1   V  vocabulary 11
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from vlmport.runtime.manifest import CacheSpec

D, HEADS, KV, HEAD, V = 8, 2, 1, 8, 11


def spec(num_layers: int = 2, **changes: object) -> CacheSpec:
    fields = {"num_layers": num_layers, "num_kv_heads": KV, "head_dim": HEAD, "dtype": "float32", "max_length": 64}
    return CacheSpec(**(fields | changes))


def weights(num_layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"head": (D, V), "place": (D,)}
    for n in range(num_layers):
        shapes |= {f"q{n}": (D, HEADS * HEAD), f"k{n}": (D, KV * HEAD), f"v{n}": (D, KV * HEAD)}
        shapes[f"o{n}"] = (HEADS * HEAD, D)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def save(path: Path, *, num_layers: int = 2, mrope: bool = True, keep: bool = True, cache_type: int = T.FLOAT) -> Path:
    """Writes the graph. keep: with the optional input num_logits_to_keep, an initializer that is also an input."""
    value = helper.make_tensor_value_info
    node = helper.make_node
    rows = [3, "batch", "sequence"] if mrope else ["batch", "sequence"]
    nodes = [
        node("Cast", ["position_ids"], ["position_f"], to=T.FLOAT),
        node("ReduceSum", ["position_f", "axis0"], ["position"], keepdims=0)
        if mrope
        else node("Identity", ["position_f"], ["position"]),
        node("Unsqueeze", ["position", "last"], ["position_col"]),
        node("Mul", ["position_col", "place"], ["placed"]),
        node("Sin", ["placed"], ["wave"]),
        node("Add", ["inputs_embeds", "wave"], ["x0"]),
        node("ReduceSum", ["attention_mask", "axis1"], ["length"], keepdims=0),
        node("Sub", ["length", "one"], ["before_last"]),
        node("Cast", ["before_last"], ["seqlens_k"], to=T.INT32),
        node("Shape", ["attention_mask"], ["total_1"], start=1, end=2),
        node("Squeeze", ["total_1"], ["total_i64"]),
        node("Cast", ["total_i64"], ["total"], to=T.INT32),
    ]
    inputs = [
        value("inputs_embeds", T.FLOAT, ["batch", "sequence", D]),
        value("attention_mask", T.INT64, ["batch", "total_length"]),
        value("position_ids", T.INT64, rows),
    ]
    outputs = [value("logits", T.FLOAT, ["batch", "kept", V])]
    for n in range(num_layers):
        nodes += [node("MatMul", [f"x{n}", f"{part}{n}"], [f"{part}_{n}"]) for part in "qkv"]
        past = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
        sources = [f"q_{n}", f"k_{n}", f"v_{n}", *past, "seqlens_k", "total"]
        results = [f"a_{n}", f"present.{n}.key", f"present.{n}.value"]
        heads = {"num_heads": HEADS, "kv_num_heads": KV}
        nodes.append(node("GroupQueryAttention", sources, results, domain="com.microsoft", **heads))
        nodes += [node("MatMul", [f"a_{n}", f"o{n}"], [f"b_{n}"]), node("Add", [f"x{n}", f"b_{n}"], [f"x{n + 1}"])]
        for part in ("key", "value"):
            inputs.append(value(f"past_key_values.{n}.{part}", cache_type, ["batch", KV, "past_length", HEAD]))
            outputs.append(value(f"present.{n}.{part}", cache_type, ["batch", KV, "present_length", HEAD]))
    constants = {"axis0": [0], "axis1": [1], "last": [-1], "one": [1], "end": [2**62]}
    if keep:
        inputs.append(value("num_logits_to_keep", T.INT64, [1]))
        constants |= {"num_logits_to_keep": [1]}
        nodes.append(node("Neg", ["num_logits_to_keep"], ["from"]))
        nodes.append(node("Slice", [f"x{num_layers}", "from", "end", "axis1"], ["kept_rows"]))
    else:
        nodes.append(node("Slice", [f"x{num_layers}", "last", "end", "axis1"], ["kept_rows"]))
    nodes.append(node("MatMul", ["kept_rows", "head"], ["logits"]))
    arrays = weights(num_layers) | {name: np.array(values) for name, values in constants.items()}
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def reference(embeds_SD: np.ndarray, position_ids: np.ndarray, num_layers: int = 2) -> np.ndarray:
    """Logits [S, V] of the whole sequence at once, without a cache."""
    w = weights(num_layers)
    position = position_ids.sum(0) if position_ids.ndim == 2 else position_ids
    x = embeds_SD + np.sin(position[:, None] * w["place"])
    causal = np.tril(np.ones((len(x), len(x)), bool))
    for n in range(num_layers):
        q = (x @ w[f"q{n}"]).reshape(-1, HEADS, HEAD).transpose(1, 0, 2)
        scores = np.where(causal, q @ (x @ w[f"k{n}"]).T / np.sqrt(HEAD), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (shares / shares.sum(-1, keepdims=True)) @ (x @ w[f"v{n}"])
        x = x + attended.transpose(1, 0, 2).reshape(-1, HEADS * HEAD) @ w[f"o{n}"]
    return x @ w["head"]
