"""NF4 and FP4: the codes, the bytes and the values are those of bitsandbytes, in any chunks of rows."""

from pathlib import Path

import numpy as np
import pytest
from float_graphs import decoder, embedding, random_source, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlmport.quant import data_file
from vlmport.quant.nf4 import TABLES, dequantize_flat, flat_shapes, quantize_flat, whole_rows
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.quant.variant import write_variant
from vlmport.runtime.errors import CheckpointError, RecipeError

KINDS = st.sampled_from(["nf4", "fp4"])
BLOCKS = st.sampled_from([16, 64, 128])
NUMBERS = st.floats(-1e6, 1e6, width=32)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=NUMBERS)


def values_of(weight: np.ndarray, table: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """What codes stand for, and the scale of each value."""
    packed, absmax = quantize_flat(weight, table, block)
    shapes = flat_shapes(*weight.shape, block)
    assert (packed.shape, absmax.shape) == (shapes["quantized"], shapes["scales"])
    values = dequantize_flat(packed, absmax, table, block)[: weight.size].reshape(weight.shape)
    return values, np.repeat(absmax, block)[: weight.size].reshape(weight.shape)


@given(MATRICES, KINDS, BLOCKS)
def test_a_value_errs_by_half_a_gap_of_the_table_at_most(weight: np.ndarray, table: str, block: int) -> None:
    values, scales = values_of(weight, table, block)
    widest = np.diff(np.sort(TABLES[table])).max()
    assert (np.abs(values.astype(np.float64) - weight) <= scales * (widest / 2 + 1e-6) + 1e-37).all()


@given(MATRICES, KINDS, BLOCKS)
def test_what_was_quantized_stays_what_it_is(weight: np.ndarray, table: str, block: int) -> None:
    values, _ = values_of(weight, table, block)
    np.testing.assert_array_equal(values_of(values, table, block)[0], values)


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 108), (128, 384)])
def test_bytes_are_those_of_bitsandbytes(table: str, shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, state = theirs.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type=table)
    packed, absmax = quantize_flat(weight, table, 64)
    np.testing.assert_array_equal(packed, codes.numpy().reshape(-1))
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    np.testing.assert_array_equal(TABLES[table], state.code.numpy())
    values = dequantize_flat(packed, absmax, table, 64)[: weight.size].reshape(shape)
    np.testing.assert_array_equal(values, theirs.dequantize_4bit(codes, state).numpy())


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("num_columns", [64, 96, 108, 7])
def test_the_kernel_computes_with_these_values_however_they_are_written(
    table: str, num_columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks cross rows: 65 rows are written in chunks of as many as fill whole blocks."""
    monkeypatch.setattr(data_file, "_CHUNK_BYTES", 256)
    model = decoder({"a.weight": (65, num_columns)})
    source = random_source(model)
    recipe = Recipe("mine", (Rule("*/*.weight", WeightFormat(bits=4, block_size=64, values=table)),))
    variant, _ = write_variant(recipe, "cpu", ("decoder",), {}, lambda _: (model, source), tmp_path)
    assert variant.graphs["decoder"].formats == {"a.weight": table}
    x = np.random.default_rng(1).standard_normal((3, num_columns)).astype(np.float32)
    values, _ = values_of(source.arrays["a.weight"], table, 64)
    biases = [array for name, array in source.arrays.items() if name != "a.weight"]
    expected = x @ values.T + sum(biases)
    np.testing.assert_allclose(run(tmp_path / variant.graphs["decoder"].graph, x=x), expected, atol=1e-4)


@given(st.integers(1, 500), BLOCKS)
def test_whole_rows_fill_whole_blocks(num_columns: int, block: int) -> None:
    rows = whole_rows(num_columns, block)
    assert rows * num_columns % block == 0
    assert all(fewer * num_columns % block for fewer in range(1, min(rows, 20)))


def test_the_recipe_is_that_of_int4_but_for_the_decoder() -> None:
    nf4, int4 = load_recipe("nf4"), load_recipe("int4")
    assert nf4.format_of("decoder", "layers.0.weight") == WeightFormat(bits=4, block_size=64, values="nf4")
    for role, name in (("decoder", "lm_head.weight"), ("embed_tokens", "a.weight"), ("vision_encoder", "a.weight")):
        assert nf4.format_of(role, name) == int4.format_of(role, name)


def test_what_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="takes bits 4"):
        WeightFormat(bits=8, values="nf4")
    with pytest.raises(RecipeError, match="block_size 48 with values nf4: use a power of two"):
        WeightFormat(bits=4, block_size=48, values="nf4")
    recipe = Recipe("mine", (Rule("*/*.weight", WeightFormat(bits=4, values="fp4")),))
    table = embedding(40, 32)
    with pytest.raises(RecipeError, match="an embedding has no values fp4"):
        write_variant(recipe, "cpu", ("embed_tokens",), {}, lambda _: (table, random_source(table)), tmp_path)
    with pytest.raises(CheckpointError, match="here: holds NaN"):
        quantize_flat(np.full((2, 2), np.nan, np.float32), "nf4", 64, name="here")
