"""Balancing: the float function to the bit, outliers that cost no accuracy, equal bytes from any start."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from float_graphs import ArraySource, normed, random_source, run
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.quant.apply import quantize_package
from vlmport.quant.balance import balance, balancing_factors
from vlmport.quant.found import Factors
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.quant.rewrite import rewrite
from vlmport.quant.store import write_graph
from vlmport.quant.variant import write_variant
from vlmport.runtime.errors import RecipeError
from vlmport.runtime.manifest import SCHEMA, FileEntry, Manifest, Source, Variant
from vlmport.runtime.package import MANIFEST_NAME, manifest_text

NORMS = ["RMSNormalization", "LayerNormalization"]
SHAPES = {"gate.weight": (96, 320), "up.weight": (96, 320)}
ROLE = "vision_encoder"
PLAIN = WeightFormat(bits=8, activations="int8-dynamic")
BALANCED = WeightFormat(bits=8, activations="int8-dynamic", balance=True)
BLOCKS = WeightFormat(bits=8)
BALANCED_BLOCKS = WeightFormat(bits=8, balance=True)


def recipe(*formats: WeightFormat) -> Recipe:
    """The first format for `gate`, the last for the rest."""
    return Recipe("mine", (Rule("*/gate.*", formats[0]), Rule("*/*.weight", formats[-1])))


def write(folder: Path, model: ir.Model, source: ArraySource, rules: Recipe) -> Path:
    """The file that a variant has for this graph."""
    folder.mkdir(exist_ok=True)
    weights = balance(model.graph, ROLE, rules, "cpu", source).apply(model, source)
    return folder / write_graph(model, rewrite(model, ROLE, rules), weights, folder, "graph").graph


def initializer(path: Path, name: str) -> np.ndarray:
    (tensor,) = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name == name]
    return onnx.numpy_helper.to_array(tensor)


def with_outliers(source: ArraySource, factor: float, channels: int) -> ArraySource:
    """The same function, `factor` times larger behind the norm in some channels."""
    chosen = np.random.default_rng(1).choice(320, channels, replace=False)
    for name, array in source.arrays.items():
        if name.startswith("norm."):
            array[chosen] *= factor
        else:
            array[:, chosen] /= factor
    return source


def lowest_cosines(
    tmp_path: Path, norm: str, source: ArraySource, plain: WeightFormat, balanced: WeightFormat
) -> list[float]:
    """Against float32, the first percentile over tokens: not balanced, and balanced."""
    x = np.random.default_rng(2).standard_normal((400, 320)).astype(np.float32)
    exact, *others = (
        run(write(tmp_path / str(number), normed(norm, SHAPES), source, recipe(format)), x=x).astype(np.float64)
        for number, format in enumerate((WeightFormat(bits=32), plain, balanced))
    )
    size = np.linalg.norm(exact, axis=1)
    return [float(np.percentile((exact * y).sum(1) / size / np.linalg.norm(y, axis=1), 1)) for y in others]


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 4), width=st.integers(1, 150))
@settings(max_examples=15, deadline=None)
def test_in_float_the_function_is_the_same_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, norm: str, seed: int, spread: float, width: int
) -> None:
    random = np.random.default_rng(seed)
    shapes = {"gate.weight": (24, width), "up.weight": (24, width)}
    model = normed(norm, shapes)
    source = random_source(model, seed)
    for array in source.arrays.values():
        array *= np.exp(spread * random.standard_normal(width)).astype(np.float32)
    source.arrays["norm.weight"][random.random(width) < 0.1] = 0
    weights = balance(model.graph, ROLE, recipe(BALANCED), "cpu", source).apply(model, source)
    values = {name: model.graph.initializers[name].const_value for name in source.arrays if name.startswith("norm.")}
    moved = {name: source.arrays[name] if value is None else value.numpy() for name, value in values.items()}
    moved |= {name: weights.rows(name, 0, 24) for name in shapes}
    x = random.standard_normal((7, width)).astype(np.float32)
    folder, floats = tmp_path_factory.mktemp("graphs"), recipe(WeightFormat(bits=32))
    expected = run(write(folder / "before", normed(norm, shapes), source, floats), x=x)
    result = run(write(folder / "after", normed(norm, shapes), ArraySource(moved), floats), x=x)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [30, 100])
@pytest.mark.parametrize("formats", [(PLAIN, BALANCED), (BLOCKS, BALANCED_BLOCKS)])
def test_outliers_of_the_norm_cost_nothing(
    tmp_path: Path, norm: str, factor: float, formats: tuple[WeightFormat, WeightFormat]
) -> None:
    source = random_source(normed(norm, SHAPES))
    calm, _ = lowest_cosines(tmp_path, norm, source, *formats)
    plain, balanced = lowest_cosines(tmp_path, norm, with_outliers(source, factor, 4), *formats)
    assert calm > 0.9995
    assert plain < 0.9995
    assert 1 - balanced < (1 - plain) / 2
    assert balanced > 0.9995


def test_factors() -> None:
    """Powers of two about 1 in the middle; 1 where there is nothing to divide by."""
    reach = np.array([1, 1, 1, 64, 64, 0, 1, np.nan, 1, 1e-30], np.float32)
    largest = np.array([1, 1, 1, 1 / 64, 1 / 64, 1, 0, 1, np.inf, 1], np.float32)
    assert balancing_factors(reach, largest).tolist() == [1, 1, 1, 64, 64, 1, 1, 1, 1, 2.0**-16]
    assert balancing_factors(np.zeros(3, np.float32), largest[:3]).tolist() == [1, 1, 1]
    random = np.random.default_rng(0).lognormal(0, 3, (2, 500)).astype(np.float32)
    assert (np.frexp(balancing_factors(*random))[0] == 0.5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_equal_bytes_from_parameters_and_constants(tmp_path: Path, norm: str) -> None:
    """An export has the norm's values in the checkpoint, `quantize` in the float graph of a package."""
    source = with_outliers(random_source(normed(norm, SHAPES)), 30, 4)
    a = write(tmp_path / "a", normed(norm, SHAPES), source, recipe(BALANCED))
    model = normed(norm, SHAPES)
    for name in [name for name in source.arrays if name.startswith("norm.")]:
        model.graph.initializers[name].const_value = ir.Tensor(source.arrays.pop(name), name=name)
    b = write(tmp_path / "b", model, source, recipe(BALANCED))
    assert [file.read_bytes() for file in sorted(a.parent.iterdir())] == [
        file.read_bytes() for file in sorted(b.parent.iterdir())
    ]


def make_package(folder: Path, source: ArraySource, *names: str) -> Path:
    """A package of a vision encoder alone, as an export writes it."""
    (folder / "onnx").mkdir(parents=True)
    variants: dict[str, Variant] = {}
    files: dict[str, FileEntry] = {}
    for name in names:
        variants[name], new = write_variant(
            load_recipe(name),
            "cpu",
            [ROLE],
            variants,
            lambda role: (normed("LayerNormalization", SHAPES), source),
            folder / "onnx",
        )
        files |= new
    weights = Source("tiny", "tiny", "float32", 1, {})
    manifest = Manifest(SCHEMA, "tiny", "cpu", weights, (ROLE,), variants, {}, dict(sorted(files.items())))
    (folder / MANIFEST_NAME).write_text(manifest_text(manifest))
    return folder


def test_quantize_writes_the_bytes_of_an_export(tmp_path: Path) -> None:
    source = with_outliers(random_source(normed("LayerNormalization", SHAPES)), 64, 4)
    exported = make_package(tmp_path / "exported", source, "fp32", "int8")
    grown = make_package(tmp_path / "grown", source, "fp32")
    quantize_package(grown, load_recipe("int8"))
    a, b = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (exported, grown)
    )
    assert a == b
    before = initializer(grown / "onnx" / "vision_encoder.onnx", "norm.weight")
    after = initializer(grown / "onnx" / "vision_encoder_int8.onnx", "norm.weight")
    np.testing.assert_array_equal(before, source.arrays["norm.weight"])
    assert np.abs(after).max() < np.abs(before).max() / 8


def test_no_weight_is_read_as_a_whole(tmp_path: Path) -> None:
    model = normed("RMSNormalization", {"gate.weight": (4000, 1024)})
    source = random_source(model)
    write(tmp_path, model, source, recipe(BALANCED))
    assert source.largest <= 4 << 20


def test_builtin_recipes_balance_the_tower_on_the_cpu(tmp_path: Path) -> None:
    source = with_outliers(random_source(normed("RMSNormalization", SHAPES)), 64, 4)
    large = np.sort(np.abs(source.arrays["norm.weight"]))[-1]
    for name in ("int8", "int4", "int8-dynamic"):
        path = write(tmp_path / name, normed("RMSNormalization", SHAPES), source, load_recipe(name))
        assert np.abs(initializer(path, "norm.weight")).max() < large / 8
    path = write(tmp_path / "fp32", normed("RMSNormalization", SHAPES), source, load_recipe("fp32"))
    np.testing.assert_array_equal(initializer(path, "norm.weight"), source.arrays["norm.weight"])


def other_reader(model: ir.Model) -> None:
    node = ir.node("Neg", [model.graph.node("normed_node").outputs[0]], name="other")
    node.outputs[0].name, node.outputs[0].type = "other", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(("rows", 320))
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def output_of_the_graph(model: ir.Model) -> None:
    model.graph.outputs.append(model.graph.node("normed_node").outputs[0])


def shared_norm_weight(model: ir.Model) -> None:
    total = model.graph.node("total_node")
    node = ir.node("ReduceSum", [model.graph.initializers["norm.weight"]], {"keepdims": 0}, name="other")
    node.outputs[0].name = "other"
    model.graph.insert_before(total, node)
    total.resize_inputs(3)
    total.replace_input_with(2, node.outputs[0])


def shared_weight(model: ir.Model) -> None:
    """`up` reads another value, and is also what `gate` reads its weight from."""
    node = model.graph.node("up.weight_out_node")
    negative = ir.node("Neg", [model.graph.inputs[0]], name="negative")
    negative.outputs[0].name = "negative"
    model.graph.insert_before(node, negative)
    node.replace_input_with(0, negative.outputs[0])
    node.replace_input_with(1, model.graph.initializers["gate.weight"])
    del model.graph.initializers["up.weight"]


@pytest.mark.parametrize("change", [other_reader, output_of_the_graph, shared_norm_weight, shared_weight])
def test_what_others_read_stays(tmp_path: Path, change) -> None:
    model = normed("RMSNormalization", SHAPES)
    change(model)
    source = with_outliers(random_source(model), 30, 4)
    path = write(tmp_path, model, source, recipe(BALANCED))
    np.testing.assert_array_equal(initializer(path, "norm.weight"), source.arrays["norm.weight"])
    run(path, x=np.ones((3, 320), np.float32))


@pytest.mark.parametrize("other", [PLAIN, BLOCKS, WeightFormat(bits=32)])
@pytest.mark.parametrize("is_first", [True, False])
def test_all_linears_behind_a_norm_say_it_or_none_is_balanced(
    tmp_path: Path, other: WeightFormat, is_first: bool
) -> None:
    source = with_outliers(random_source(normed("RMSNormalization", SHAPES)), 30, 4)
    formats = (BALANCED, other) if is_first else (other, BALANCED)
    path = write(tmp_path, normed("RMSNormalization", SHAPES), source, recipe(*formats))
    np.testing.assert_array_equal(initializer(path, "norm.weight"), source.arrays["norm.weight"])
    run(path, x=np.ones((3, 320), np.float32))


@pytest.mark.parametrize("format", [{"bits": 8, "values": "integer", "accuracy_level": 1}, {"bits": 16}])
def test_balance_is_for_rounded_activations(format: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="balance true: it is for rounded activations"):
        WeightFormat(balance=True, **format)


def test_what_is_stored_once_for_two_graphs_stays() -> None:
    """A head that is the table again is read from there; nor is there anything to gain where no kernel rounds."""
    model = normed("RMSNormalization", SHAPES)
    source = with_outliers(random_source(model), 30, 4)
    balanced = recipe(BALANCED_BLOCKS)
    table = (source.origin("gate.weight"), BLOCKS.stored)
    assert balance(model.graph, ROLE, balanced, "cpu", source, {table}) == Factors()
    assert balance(model.graph, ROLE, balanced, "cuda", source) == Factors()
    other = (source.origin("gate.weight"), WeightFormat(bits=4).stored)
    assert set(balance(model.graph, ROLE, balanced, "cpu", source, {other}).column_factors) == set(SHAPES)
