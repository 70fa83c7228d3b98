"""The int8-dynamic linear: its codes, its graph in ONNX Runtime against numpy, its file, its limits."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from float_graphs import F16, ArraySource, decoder, embedding, random_source, run
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.quant.dynamic import channel_shapes, dequantize_channels, quantize_channels
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.quant.rewrite import rewrite
from vlmport.quant.store import write_graph
from vlmport.runtime.errors import CheckpointError, RecipeError

DYNAMIC = WeightFormat(bits=8, activations="int8-dynamic")
RECIPE = Recipe("dynamic", (Rule("*/*.weight", DYNAMIC),))


def reference(x_MK: np.ndarray, W_NK: np.ndarray) -> np.ndarray:
    """The formula of quant/dynamic.py by itself: float64 [M, N], but for scales in float32 as the graph has them."""
    codes_NK, scales_N = quantize_channels(W_NK)
    s_M1 = np.maximum(np.abs(x_MK).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    q_MK = np.rint(x_MK / s_M1).astype(np.int64)
    return (q_MK @ codes_NK.T.astype(np.int64)) * scales_N.astype(np.float64) * s_M1


def linear(folder: Path, W_NK: np.ndarray) -> Path:
    """A graph of one linear without its bias, stored by the recipe."""
    model = decoder({"fc.weight": W_NK.shape})
    source = ArraySource({"fc.weight": W_NK, "fc.bias": np.zeros(len(W_NK), np.float32)})
    return folder / write_graph(model, rewrite(model, "decoder", RECIPE), source, folder, "linear").graph


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(-6, 6))
@settings(max_examples=25, deadline=None)
def test_the_graph_computes_the_formula(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, tokens: int, seed: int, exponent: float
) -> None:
    """Integer sums are exact, so only the last float32 products may differ; K is a multiple of nothing."""
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((rows, columns)) * 10.0**exponent).astype(np.float32)
    x = random.standard_normal((tokens, columns)).astype(np.float32)
    expected = reference(x, weight)
    y = run(linear(tmp_path_factory.mktemp("linear"), weight), x=x)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def test_the_largest_codes_do_not_saturate(tmp_path: Path) -> None:
    """All products at their largest, at the inner width of a real tower: 3420 x 127 x 127."""
    weight = np.ones((64, 3420), np.float32)
    weight[::2] = -1
    x = np.stack([np.ones(3420), -np.ones(3420)]).astype(np.float32)
    y = run(linear(tmp_path, weight), x=x)
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-6)


def test_tokens_of_zeros_and_of_extremes_are_finite(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 100)).astype(np.float32)
    weight[3] = 0
    x = np.zeros((4, 100), np.float32)
    x[1], x[2], x[3, 5] = 1e-38, 1e30, -3.0
    y = run(linear(tmp_path, weight), x=x)
    assert np.isfinite(y).all()
    assert not y[0].any()
    assert not y[:, 3].any()
    np.testing.assert_allclose(y[3], -3.0 * dequantize_channels(*quantize_channels(weight))[:, 5], rtol=1e-5)


def test_a_token_with_outliers_costs_the_others_nothing(tmp_path: Path) -> None:
    """What a scale a token is for: 1000 times larger values in one row leave the rows beside it as they were."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 256)).astype(np.float32)
    x = random.standard_normal((8, 256)).astype(np.float32)
    graph = linear(tmp_path, weight)
    calm = run(graph, x=x)
    x[3] *= 1000
    np.testing.assert_array_equal(np.delete(run(graph, x=x), 3, 0), np.delete(calm, 3, 0))


@given(st.integers(1, 20), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_codes_err_by_half_a_scale(rows: int, columns: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    codes, scales = quantize_channels(weight)
    assert codes.dtype == np.int8
    assert (np.abs(codes).max(1) == 127).all()
    assert (np.abs(dequantize_channels(codes, scales) - weight) <= 0.5001 * scales[:, None]).all()
    parts = [quantize_channels(weight[i : i + 3]) for i in range(0, rows, 3)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), codes)


def test_channels_of_zeros_and_of_subnormals() -> None:
    codes, scales = quantize_channels(np.array([[0, 0], [1e-40, 0], [np.float32(3e38), -1]], np.float32))
    assert codes.tolist() == [[0, 0], [0, 0], [127, 0]]
    assert scales[:2].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"fc\.weight: holds NaN or infinity"):
        quantize_channels(np.array([[0, np.nan]], np.float32), name="fc.weight")


def test_linears_that_read_the_same_values_share_their_codes(tmp_path: Path) -> None:
    model = decoder({"gate.weight": (48, 102)})
    x = next(node for node in model.graph if node.op_type == "FusedMatMul").inputs[0]
    up = ir.Value(name="up.weight", shape=ir.Shape((48, 102)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("FusedMatMul", [x, up], {"transB": 1}, domain="com.microsoft", name="up")
    total = ir.node("Add", [model.graph.outputs[0], node.outputs[0]], name="total")
    node.outputs[0].name, total.outputs[0].name = "up_out", "total"
    total.outputs[0].type, total.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("rows", 48))
    first = next(node for node in model.graph if node.op_type == "FusedMatMul")
    model.graph.insert_before(first, node)  # `up` is first in the graph, and its weight is last
    model.graph.append(total)
    model.graph.initializers.add(up)
    model.graph.outputs[0] = total.outputs[0]
    source = random_source(model)
    written = write_graph(model, rewrite(model, "decoder", RECIPE), source, tmp_path, "pair")
    operators = [node.op_type for node in model.graph]
    assert operators.count("QuantizeTokens") == 1
    assert operators.count("IntegerLinear") == 2
    onnx.checker.check_model(onnx.load(tmp_path / written.graph))
    x = np.random.default_rng(1).standard_normal((5, 102)).astype(np.float32)
    expected = reference(x, source.arrays["gate.weight"]) + reference(x, source.arrays["up.weight"])
    expected += source.arrays["gate.bias"]
    np.testing.assert_allclose(run(tmp_path / written.graph, x=x), expected, rtol=1e-5, atol=1e-4)


def test_a_graph_input_and_three_axes(tmp_path: Path) -> None:
    """A linear may read an input of the graph, and a decoder's values have a batch axis."""
    model = decoder({"fc.weight": (16, 40)})
    scaled, x = next(iter(model.graph)), model.graph.inputs[0]
    scaled.outputs[0].replace_all_uses_with(x)
    model.graph.remove(scaled, safe=True)
    x.shape = ir.Shape(("batch", "tokens", 40))
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(("batch", "tokens", 16))
    source = random_source(model)
    written = write_graph(model, rewrite(model, "decoder", RECIPE), source, tmp_path, "linear")
    values = np.random.default_rng(1).standard_normal((2, 3, 40)).astype(np.float32)
    expected = reference(values.reshape(6, 40), source.arrays["fc.weight"]) + source.arrays["fc.bias"]
    np.testing.assert_allclose(run(tmp_path / written.graph, x=values).reshape(6, 16), expected, rtol=1e-5, atol=1e-5)


def test_the_file_holds_codes_by_inputs(tmp_path: Path) -> None:
    """Written in chunks of rows, whatever their number: the chunk is one row at this width."""
    weight = np.random.default_rng(0).standard_normal((5, 1_100_000)).astype(np.float32)
    path = linear(tmp_path, weight)
    (tensor,) = [t for t in onnx.load(path).graph.initializer if t.name == "fc.weight_Q"]
    assert tuple(tensor.dims) == channel_shapes(5, 1_100_000)["quantized"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), quantize_channels(weight)[0].T)


def test_builtin_rules_depend_on_the_target() -> None:
    for name in ("int8", "int4"):
        recipe = load_recipe(name)
        on_cpu = recipe.format_of("vision_encoder", "blocks.0.attn.qkv.weight", "cpu")
        assert on_cpu == WeightFormat(bits=8, activations="int8-dynamic", balance=True)
        assert recipe.format_of("vision_encoder", "blocks.0.attn.qkv.weight", "cuda") == WeightFormat(bits=8)
    for shape in (F16, None):
        model = decoder({"blocks.weight": (32, 64)}, *([shape] if shape else []))
        stored = rewrite(model, "vision_encoder", load_recipe("int8"), "cuda" if shape else "cpu")
        expected = "MatMulNBits" if shape else "IntegerLinear"
        assert expected in [node.op_type for node in model.graph]
        assert stored[0].stored_as == ("int8" if shape else "int8-dynamic")


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"fc\.weight: activations int8-dynamic are for target cpu"):
        rewrite(decoder({"fc.weight": (8, 8)}, F16), "decoder", RECIPE, "cuda")
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight: a table has no activations to round"):
        rewrite(embedding(8, 16), "embed_tokens", RECIPE)
