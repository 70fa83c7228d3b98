"""Methods that find codes: bounds of each, odd shapes, and that none errs more by its own measure than rounding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlmport.quant.calibrate import quantize_stage
from vlmport.quant.found import FoundRole
from vlmport.quant.gptq import factorize, gptq_rows
from vlmport.quant.grid import best_grid, nearest_grid
from vlmport.quant.hqq import hqq_rows
from vlmport.quant.recipe import WeightFormat, load_recipe, with_method
from vlmport.quant.rtn import Codes, dequantize_rows, quantize_rows
from vlmport.runtime.errors import CheckpointError, RecipeError

FORMATS = st.builds(
    WeightFormat, bits=st.sampled_from([2, 4, 8]), block_size=st.sampled_from([32, 64]), symmetric=st.booleans()
)
NUMBERS = st.floats(-1e4, 1e4, width=32)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)), elements=NUMBERS)


def stands_for(codes: Codes, num_columns: int) -> np.ndarray:
    return dequantize_rows(*codes, num_columns).astype(np.float64)


def check_bound(weight: np.ndarray, codes: Codes, format: WeightFormat) -> None:
    """Half a scale within the values that codes reach; beyond them, the distance to the nearest end."""
    scale, zero = (
        np.repeat(part.astype(np.float64), format.block_size, axis=1)[:, : weight.shape[1]] for part in codes[1:]
    )
    low, high = (0 - zero) * scale, (2**format.bits - 1 - zero) * scale
    beyond = np.maximum(low - weight, 0) + np.maximum(weight - high, 0)
    error = np.abs(stands_for(codes, weight.shape[1]) - weight)
    assert (error <= np.maximum(beyond, scale / 2) * (1 + 1e-3) + 1e-4 * scale + 1e-30).all()


@given(MATRICES, FORMATS)
@settings(max_examples=60)
def test_hqq(weight: np.ndarray, format: WeightFormat) -> None:
    codes = hqq_rows(weight, format)
    assert codes[0].max() < 2**format.bits
    assert codes[2].max() < 2**format.bits
    check_bound(weight, codes, format)
    plain = quantize_rows(weight, format)
    by_norm = [(np.abs(stands_for(found, weight.shape[1]) - weight) ** 0.7).sum() for found in (codes, plain)]
    assert by_norm[0] <= by_norm[1] * (1 + 1e-3) + 1e-6
    beyond = codes[0][:, weight.shape[1] :]
    assert (beyond == np.repeat(codes[2], format.block_size, axis=1)[:, weight.shape[1] :]).all(), (
        "padding stands for 0"
    )


def test_hqq_gains_where_tails_are_long() -> None:
    weight = np.random.default_rng(0).standard_t(3, (16, 256)).astype(np.float32)
    for bits, least in ((2, 1.0), (4, 0.97)):
        format = WeightFormat(bits)
        errors = [
            (np.abs(stands_for(find(weight, format), 256) - weight) ** 0.7).sum() for find in (hqq_rows, quantize_rows)
        ]
        assert errors[0] <= least * errors[1]


@given(MATRICES, FORMATS)
@settings(max_examples=60)
def test_the_grid_of_torch_is_that_of_numpy(weight: np.ndarray, format: WeightFormat) -> None:
    codes, scales, zero_points = quantize_rows(weight, format)
    padded = np.pad(weight, ((0, 0), (0, codes.shape[1] - weight.shape[1])))
    blocks = torch.from_numpy(padded).unflatten(1, (-1, format.block_size))
    grid = nearest_grid(blocks, format)
    np.testing.assert_allclose(grid.scales.numpy(), scales, rtol=3e-7)
    np.testing.assert_allclose(
        grid.nearest(blocks).flatten(1),
        stands_for((codes, scales, zero_points), codes.shape[1]),
        atol=scales.max() * 1.001,
    )


@given(MATRICES, FORMATS, st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_best_grid_errs_no_more(weight: np.ndarray, format: WeightFormat, seed: int) -> None:
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % format.block_size)))
    blocks = torch.from_numpy(padded).unflatten(1, (-1, format.block_size))
    roots = torch.from_numpy(np.random.default_rng(seed).random((*blocks.shape[1:], blocks.shape[2]), np.float32))
    whole = roots @ roots.transpose(1, 2)
    for importance in (whole.diagonal(dim1=1, dim2=2), whole):
        matrix = torch.diag_embed(importance) if importance.dim() == 2 else importance
        errors = [
            grid.nearest(blocks) - blocks
            for grid in (best_grid(blocks, format, importance), nearest_grid(blocks, format))
        ]
        best, plain = ((torch.einsum("nbs,bst->nbt", error, matrix) * error).sum(-1) for error in errors)
        assert bool((best <= plain * (1 + 1e-3) + 1e-6).all())


def hessian(num_columns: int, seed: int) -> np.ndarray:
    """Of inputs with a few large channels, and some that are never used."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((3 * num_columns, num_columns)) @ random.standard_normal((num_columns,) * 2)
    inputs *= np.exp(random.normal(0, 1.5, num_columns))
    inputs[:, random.integers(0, num_columns)] = 0
    return inputs.T @ inputs


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block_size"), [(2, 32), (4, 16), (4, 128), (8, 32)])
@pytest.mark.parametrize("shape", [(7, 102), (16, 64), (3, 20)])
def test_gptq(shape: tuple[int, int], bits: int, block_size: int, symmetric: bool) -> None:
    """No row errs more by the Hessian than rounded to nearest; all together clearly less."""
    format = WeightFormat(bits, block_size, symmetric)
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    H = hessian(shape[1], 2)
    codes = gptq_rows(torch.from_numpy(weight), factorize([torch.from_numpy(H).float()], block_size), format)
    check_range = 2**bits
    assert codes[0].max() < check_range
    assert codes[2].max() < check_range

    def errors(found: Codes) -> np.ndarray:
        delta = stands_for(found, shape[1]) - weight
        return ((delta @ H) * delta).sum(axis=1)

    by_gptq, plain = errors(codes), errors(quantize_rows(weight, format))
    assert (by_gptq <= plain * (1 + 1e-3)).all()
    assert by_gptq.sum() < 0.8 * plain.sum()


def test_gptq_without_activations_is_rounding_to_nearest() -> None:
    weight = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    format = WeightFormat(4)
    codes = gptq_rows(torch.from_numpy(weight), factorize([torch.zeros(64, 64)], 32), format)
    check_bound(weight, codes, format)


class Readers:
    """A stage of linears that read one value."""

    def __init__(self, names: Sequence[str], num_columns: int) -> None:
        random = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(6, num_columns, generator=random) for name in "qkv"}
        self.linears: dict[str, torch.nn.Module] = {name: torch.nn.Linear(num_columns, 6) for name in names}
        self.parameters = {name: torch.nn.Parameter(weights[name]) for name in names}
        self.num_samples, self._x = 2, torch.randn(2, 40, num_columns, generator=random)

    def run(self, sample: int) -> torch.Tensor:
        x = self._x[sample]
        return torch.cat([linear(x) for linear in self.linears.values()], -1)

    def row_weights(self, sample: int, num_rows: int) -> torch.Tensor:
        return torch.full((num_rows,), 0.5 + sample)


@pytest.mark.parametrize("num_columns", [20, 64, 70])
@pytest.mark.parametrize("methods", [("awq", "awq", "awq"), ("awq", "gptq", "awq"), ("gptq", "awq", "gptq")])
@pytest.mark.parametrize("block_sizes", [(32, 32, 32), (16, 32, 16)])
def test_linears_that_read_one_value_get_what_each_gets_alone(
    methods: tuple[str, ...], block_sizes: tuple[int, ...], num_columns: int, tmp_path: Path
) -> None:
    """By any methods in any order, in blocks of any sizes, and where a row is shorter than a block."""
    kinds = zip("qkv", methods, block_sizes, strict=True)
    formats = {name: WeightFormat(4, block_size, method=method) for name, method, block_size in kinds}
    together = FoundRole(tmp_path)
    quantize_stage(Readers("qkv", num_columns), formats, [], "float32", together)
    for name in "qkv":
        alone = FoundRole(tmp_path / name)
        alone.folder.mkdir()
        quantize_stage(Readers(name, num_columns), formats, [], "float32", alone)
        expected, values = (found.codes[name].values(0, 6, num_columns) for found in (alone, together))
        assert np.mean(values == expected) > 0.95, "sums of other shapes differ in their last bit"


def test_values_that_are_not_finite_are_refused() -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"down\.weight: holds NaN"):
        gptq_rows(weight, factorize([torch.eye(32)], 32), WeightFormat(4), name="down.weight")
    with pytest.raises(CheckpointError, match=r"down\.weight: its inputs hold NaN"):
        factorize([torch.full((32, 32), torch.nan)], 32, name="down.weight")
    with pytest.raises(CheckpointError, match=r"down\.weight: holds NaN"):
        hqq_rows(weight.numpy(), WeightFormat(4), name="down.weight")


def test_a_method_is_for_the_fewest_bits() -> None:
    recipe = load_recipe("int4", method="gptq")
    assert recipe.name == "int4_gptq"
    methods = {
        name: recipe.format_of(*name.split("/", 1)).method
        for name in ("decoder/layers.0.weight", "decoder/lm_head.weight", "embed_tokens/table.weight")
    }
    assert list(methods.values()) == ["gptq", "rtn", "rtn"]
    int8 = load_recipe("int8", method="hqq")
    assert int8.format_of("decoder", "layers.0.weight").method == "hqq"
    assert int8.format_of("decoder", "lm_head.weight").method == "rtn", "it may be the table, and is stored once then"
    assert int8.format_of("embed_tokens", "embed_tokens.weight").method == "rtn"
    assert load_recipe("fp32", method="awq") == load_recipe("fp32"), "no codes, no method"
    assert load_recipe("int4", method="rtn") == load_recipe("int4")
    assert with_method(load_recipe("int2", block_size=64), "awq+gptq").name == "int2_b64_awq-gptq"


def test_what_no_kernel_takes_is_refused() -> None:
    with pytest.raises(RecipeError, match="block_size 16 with bits 2: use one of 32, 64, 128"):
        WeightFormat(2, block_size=16)
    with pytest.raises(RecipeError, match="accuracy_level 0 with bits 2"):
        WeightFormat(2, accuracy_level=0)
    with pytest.raises(RecipeError, match="bits 3: use 32, 16, 8, 4 or 2"):
        WeightFormat(3)
    with pytest.raises(RecipeError, match=r"method 'magic' is unknown; known methods are rtn, hqq, awq"):
        load_recipe("int4", method="magic")
    with pytest.raises(RecipeError, match=r"bits 16 is a float and has no block_size.* or method"):
        WeightFormat(16, method="gptq")
