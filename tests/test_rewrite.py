"""Float graphs rewritten by recipes: the nodes, the names, what is refused, and the way back."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from float_graphs import F16, decoder, embedding, parameter, random_source, run

from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.quant.rewrite import restore_float, rewrite
from vlmport.quant.rtn import dequantize_rows, quantize_rows
from vlmport.quant.store import write_graph
from vlmport.runtime.errors import RecipeError

SHAPES = {"layers.0.weight": (96, 102), "lm_head.weight": (33, 96)}


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def proto(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_int4_decoder() -> None:
    model = decoder(SHAPES)
    stored = rewrite(model, "decoder", load_recipe("int4"))
    assert operators(model) == ["Mul", "MatMulNBits", "Add", "MatMulNBits", "Add"]
    names = [f"layers.0.{end}" for end in ("weight_Q", "weight_scales", "weight_zero_points", "bias")]
    names += [f"lm_head.{end}" for end in ("weight_Q", "weight_scales", "weight_zero_points", "bias")]
    assert [tensor.name for tensor in stored] == names
    assert list(model.graph.initializers) == ["scale", *names]
    assert [tensor.stored_as for tensor in stored] == ["int4"] * 3 + ["float32"] + ["int8"] * 3 + ["float32"]
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    assert {name: a.value for name, a in node.attributes.items()} == {
        "K": 102,
        "N": 96,
        "bits": 4,
        "block_size": 32,
        "accuracy_level": 4,
    }
    assert [value.name for value in node.inputs] == ["scaled", *names[:3]]
    assert (stored[0].shape, stored[1].shape, stored[2].shape) == ((96, 4, 16), (384,), (192,))


def test_symmetric_weights_have_no_zero_points() -> None:
    model = decoder(SHAPES)
    format = WeightFormat(bits=4, symmetric=True)
    stored = rewrite(model, "decoder", Recipe("symmetric", (Rule("decoder/*.weight", format),)))
    assert not [tensor for tensor in stored if tensor.piece == "zero_points"]
    assert [len(node.inputs) for node in model.graph if node.op_type == "MatMulNBits"] == [3, 3]


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_graphs_run_and_say_the_same(recipe: str, tmp_path: Path) -> None:
    """Every recipe gives the float answer of the weights that it stands for; level 4 costs less than a hundredth."""
    model = decoder(SHAPES)
    source = random_source(model)
    x = np.random.default_rng(1).standard_normal((5, 102)).astype(np.float32)
    expected = x
    for name in SHAPES:
        weight = source.arrays[name]
        format = load_recipe(recipe).format_of("decoder", name)
        assert format is not None
        if format.is_quantized:
            weight = dequantize_rows(*quantize_rows(weight, format), weight.shape[1])
        elif format.bits == 16:
            weight = weight.astype(np.float16).astype(np.float32)
        expected = expected @ weight.T + source.arrays[name.replace("weight", "bias")]
    stored = rewrite(model, "decoder", load_recipe(recipe))
    written = write_graph(model, stored, source, tmp_path, "decoder")
    onnx.checker.check_model(onnx.load(tmp_path / written.graph))
    error = np.abs(run(tmp_path / written.graph, x=x) - expected).max() / np.abs(expected).max()
    assert error < (2e-2 if recipe.startswith("int") else 1e-6)


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_embeddings_run_and_say_the_same(recipe: str, tmp_path: Path) -> None:
    model = embedding(40, 108)
    source = random_source(model)
    table = source.arrays["embed_tokens.weight"]
    ids = np.array([0, 39, 7, 7])
    expected = table.astype(np.float16).astype(np.float32) if recipe == "fp16" else table
    if recipe.startswith("int"):
        expected = dequantize_rows(*quantize_rows(table, WeightFormat(bits=8)), 108)
    written = write_graph(model, rewrite(model, "embed_tokens", load_recipe(recipe)), source, tmp_path, "embed_tokens")
    np.testing.assert_array_equal(run(tmp_path / written.graph, ids=ids), expected[ids])
    assert [value.name for value in model.graph.outputs] == ["inputs_embeds"]


@pytest.mark.parametrize("build", [lambda: decoder(SHAPES), lambda: embedding(40, 108)])
def test_float16_can_be_taken_back(build) -> None:
    model, untouched = build(), build()
    role = "embed_tokens" if operators(model) == ["Gather"] else "decoder"
    rewrite(model, role, load_recipe("fp16"))
    assert "Cast" in operators(model)
    restore_float(model)
    assert proto(model) == proto(untouched)
    assert [v.dtype for v in model.graph.initializers.values()] == [
        v.dtype for v in untouched.graph.initializers.values()
    ]


def test_clones_do_not_share_what_a_recipe_changes() -> None:
    model = decoder(SHAPES)
    before = proto(model)
    rewrite(model.clone(), "decoder", load_recipe("fp16"))
    rewrite(model.clone(), "decoder", load_recipe("int4"))
    assert proto(model) == before
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT}


def test_a_weight_may_serve_several_linears() -> None:
    for recipe in ("fp16", "int8"):
        model = decoder({"lm_head.weight": (64, 64)})
        weight = model.graph.initializers["lm_head.weight"]
        last = model.graph.outputs[0]
        twice = ir.node("FusedMatMul", [last, weight], {"transB": 1}, domain="com.microsoft", name="twice")
        twice.outputs[0].name = "y"
        model.graph.append(twice)
        stored = rewrite(model, "decoder", load_recipe(recipe))
        assert [tensor.name for tensor in stored if tensor.parameter == "lm_head.weight"] == [
            name for name in model.graph.initializers if name.startswith("lm_head.weight")
        ]
        assert operators(model).count("FusedMatMul" if recipe == "fp16" else "MatMulNBits") == 2
        assert operators(model).count("Cast") == (1 if recipe == "fp16" else 0)


def test_other_nodes_keep_their_floats() -> None:
    """A matrix that is no linear's or embedding's weight is stored as it is, and so are constants of the graph."""
    model = decoder(SHAPES)
    table = parameter("table.weight", (4, 102))
    node = ir.node("MatMul", [model.graph.outputs[0], table], name="other")
    node.outputs[0].name = "y"
    model.graph.append(node)
    model.graph.initializers.add(table)
    (tensor,) = [t for t in rewrite(model, "decoder", load_recipe("int8")) if t.parameter == "table.weight"]
    assert (tensor.piece, tensor.stored_as) == ("whole", "float32")


def test_a_weight_of_two_minds_is_refused() -> None:
    model = decoder({"lm_head.weight": (64, 64)})
    node = ir.node("Gather", [model.graph.initializers["lm_head.weight"], model.graph.inputs[0]], name="gather")
    model.graph.append(node)
    with pytest.raises(RecipeError, match=r"lm_head\.weight: used by FusedMatMul, Gather"):
        rewrite(model, "decoder", load_recipe("int8"))


def test_a_rule_that_matches_nothing_is_refused() -> None:
    recipe = Recipe("slip", (Rule("decoder/lm_haed.weight", WeightFormat(bits=8)), Rule("*/*", WeightFormat(bits=4))))
    with pytest.raises(RecipeError, match=r"'decoder/lm_haed\.weight' matches no weight of decoder.*layers\.0\.weight"):
        rewrite(decoder(SHAPES), "decoder", recipe)
    rewrite(embedding(8, 32), "embed_tokens", recipe)  # says nothing about this role


def test_half_float_graphs() -> None:
    with pytest.raises(RecipeError, match="computes in float16; use fp16 in place of fp32"):
        rewrite(decoder(SHAPES, F16), "decoder", load_recipe("fp32"))
    model = decoder(SHAPES, F16)
    stored = rewrite(model, "decoder", load_recipe("fp16"))
    assert {tensor.dtype for tensor in stored} == {"float16"}
    assert "Cast" not in operators(model)
    model = decoder(SHAPES, F16)
    stored = rewrite(model, "decoder", load_recipe("int4"))
    assert {tensor.dtype for tensor in stored} == {"float16", "uint8"}
    assert model.graph.initializers["lm_head.weight_scales"].dtype == F16
