"""Bounds of a value's error for each way of finding codes, and bytes that give the codes back: all bits, odd shapes.

hqq has its own in test_methods.py, NF4 in test_nf4.py, rounded activations in test_dynamic.py, the cache in
test_kv_cache.py. The factors of awq change no function (test_calibrate.py); behind them its codes are those of a grid.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import MATRICES, check_bound

from vlmport.quant.gptq import factorize, gptq_rows
from vlmport.quant.grid import best_grid
from vlmport.quant.pack import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points
from vlmport.quant.recipe import WeightFormat
from vlmport.quant.rtn import num_blocks, quantize_rows

KERNELS = [(bits, block) for bits in (2, 4, 8) for block in (16, 32, 64, 128, 256) if bits > 2 or 16 < block < 256]
FORMATS = st.builds(lambda kernel, symmetric: WeightFormat(*kernel, symmetric), st.sampled_from(KERNELS), st.booleans())
SEEDS = st.integers(0, 2**32 - 1)


@given(MATRICES, FORMATS)
@settings(max_examples=60)
def test_rtn(weight: np.ndarray, format: WeightFormat) -> None:
    check_bound(weight, quantize_rows(weight, format), format)


@given(MATRICES, FORMATS, SEEDS)
@settings(max_examples=40)
def test_the_grid_of_awq(weight: np.ndarray, format: WeightFormat, seed: int) -> None:
    """For any importance of the inputs, unused ones among them."""
    size = format.block_size
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % size)))
    blocks = torch.from_numpy(padded).unflatten(1, (-1, size))
    importance = torch.from_numpy(np.random.default_rng(seed).exponential(1, blocks.shape[1:]).astype(np.float32))
    grid = best_grid(blocks, format, importance.where(importance > 0.2, 0))
    codes = grid.round(blocks).flatten(1).to(torch.uint8).numpy()
    check_bound(weight, (codes, grid.scales.numpy(), grid.zero_points.to(torch.uint8).numpy()), format)


@given(MATRICES, FORMATS, SEEDS)
@settings(max_examples=20)
def test_gptq_of_inputs_that_do_not_depend_on_each_other(weight: np.ndarray, format: WeightFormat, seed: int) -> None:
    """Nothing can make up for an error then, so each value is rounded to its nearest code."""
    diagonal = np.random.default_rng(seed).exponential(1, weight.shape[1]).astype(np.float32) + 0.1
    hessian = factorize([torch.diag(torch.from_numpy(diagonal))], format.block_size)
    codes = gptq_rows(torch.from_numpy(weight), hessian, format)
    check_bound(weight, codes, format)


@given(FORMATS, st.integers(1, 5), st.integers(1, 300), SEEDS)
@settings(max_examples=100)
def test_packing_gives_the_codes_back(format: WeightFormat, num_rows: int, num_columns: int, seed: int) -> None:
    random, blocks = np.random.default_rng(seed), num_blocks(num_columns, format.block_size)
    codes = random.integers(0, 2**format.bits, (num_rows, blocks * format.block_size)).astype(np.uint8)
    zero_points = random.integers(0, 2**format.bits, (num_rows, blocks)).astype(np.uint8)
    packed = pack_codes(codes, format, codes.shape[1])
    assert packed.nbytes * 8 == codes.size * format.bits
    np.testing.assert_array_equal(unpack_codes(packed, format.bits), codes)
    found = unpack_zero_points(pack_zero_points(zero_points, format), format.bits, blocks)
    np.testing.assert_array_equal(found, zero_points)
