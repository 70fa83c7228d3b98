"""Round to nearest: bounds, equality over chunks, and values that break careless code."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlmport.quant.recipe import WeightFormat
from vlmport.quant.rtn import dequantize_rows, num_blocks, quantize_rows
from vlmport.runtime.errors import CheckpointError, RecipeError

FORMATS = st.builds(
    WeightFormat, bits=st.sampled_from([4, 8]), block_size=st.sampled_from([16, 32, 64]), symmetric=st.booleans()
)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=NUMBERS)
SMALLEST = np.finfo(np.float32).smallest_normal


def round_trip(weight: np.ndarray, format: WeightFormat) -> np.ndarray:
    return dequantize_rows(*quantize_rows(weight, format), weight.shape[1])


def scale_of_each(weight: np.ndarray, format: WeightFormat) -> np.ndarray:
    scales = quantize_rows(weight, format)[1]
    return np.repeat(scales, format.block_size, axis=1)[:, : weight.shape[1]].astype(np.float64)


@given(MATRICES, FORMATS)
def test_a_value_errs_by_half_its_scale_at_most(weight: np.ndarray, format: WeightFormat) -> None:
    error = np.abs(round_trip(weight, format).astype(np.float64) - weight)
    # 1e-4 of a scale: codes are found in float32. Blocks under the smallest normal scale are stored as zeros.
    assert (error <= scale_of_each(weight, format) * (0.5 + 1e-4) + 256 * SMALLEST)[np.abs(weight) < 1e37].all()


@given(MATRICES, FORMATS)
def test_scales_are_no_larger_than_they_need_to_be(weight: np.ndarray, format: WeightFormat) -> None:
    low, high = min(0.0, float(weight.min())), max(0.0, float(weight.max()))
    span = 2 * max(-low, high) if format.symmetric else high - low
    levels = 2**format.bits - (2 if format.symmetric else 1)
    scales = quantize_rows(weight, format)[1]
    assert scales[scales != 1].max(initial=0) <= span / levels * 1.001  # 1 is the scale of a block of zeros


@given(MATRICES, FORMATS, st.data())
def test_chunks_of_rows_give_the_same_bytes(weight: np.ndarray, format: WeightFormat, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(weight)))
    whole = quantize_rows(weight, format)
    parts = [quantize_rows(part, format) for part in (weight[:cut], weight[cut:]) if len(part)]
    for index, array in enumerate(whole):
        assert np.concatenate([part[index] for part in parts]).tobytes() == array.tobytes()


@given(st.integers(0, 2**32), FORMATS)
@settings(max_examples=30)
def test_what_is_on_the_grid_stays_there(seed: int, format: WeightFormat) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**format.bits, (3, 2 * format.block_size))
    codes[:, :: format.block_size], codes[:, 1 :: format.block_size] = 0, 2**format.bits - 1  # both ends are in use
    weight = ((codes - 2 ** (format.bits - 1)) * np.float32(0.013)).astype(np.float32)
    once = quantize_rows(weight, format)
    np.testing.assert_array_equal(once[0], codes)
    np.testing.assert_allclose(dequantize_rows(*once, weight.shape[1]), weight, rtol=1e-6)


@pytest.mark.parametrize("num_columns", [1, 31, 32, 33, 102, 108, 3420])
@pytest.mark.parametrize("block_size", [32, 128])
def test_a_partial_last_block_has_a_range_of_its_own(num_columns: int, block_size: int) -> None:
    format = WeightFormat(bits=4, block_size=block_size)
    weight = np.full((2, num_columns), 5.0, np.float32)
    codes, scales, zero_points = quantize_rows(weight, format)
    blocks = num_blocks(num_columns, block_size)
    assert codes.shape == (2, blocks * block_size)
    assert scales.shape == zero_points.shape == (2, blocks)
    np.testing.assert_allclose(round_trip(weight, format), 5.0, rtol=1e-6)
    padding = np.repeat(zero_points, block_size, axis=1)[:, num_columns:]
    np.testing.assert_array_equal(codes[:, num_columns:], padding)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_zeros_constants_and_subnormals(bits: int, symmetric: bool) -> None:
    format = WeightFormat(bits=bits, symmetric=symmetric)
    for value in (0.0, -0.0, 1e-45, -1e-40):
        np.testing.assert_array_equal(round_trip(np.full((2, 32), value, np.float32), format), 0)
    for value in (3.0, -3.0, 1e30, -1e-30):
        np.testing.assert_allclose(round_trip(np.full((2, 32), value, np.float32), format), value, rtol=2e-6)


def test_the_largest_floats_do_not_overflow() -> None:
    top = np.finfo(np.float32).max
    weight = np.array([[top, -top, 0, top / 2] * 8], np.float32)
    with np.errstate(all="raise"):
        codes, scales, _ = quantize_rows(weight, WeightFormat(bits=8))
    assert np.isfinite(scales).all()
    assert (codes[0, 0], codes[0, 1]) == (255, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_named(value: float) -> None:
    weight = np.ones((3, 40), np.float32)
    weight[2, 39] = value
    with pytest.raises(CheckpointError, match=r"layers\.7\.weight: holds NaN or infinity"):
        quantize_rows(weight, WeightFormat(bits=4), name="layers.7.weight")


@given(MATRICES, FORMATS)
def test_half_float_scales_keep_the_bound(weight: np.ndarray, format: WeightFormat) -> None:
    weight = np.clip(weight, -1e5, 1e5)
    codes, scales, zero_points = quantize_rows(weight, format, scale_dtype="float16")
    assert (scales.astype(np.float16).astype(np.float32) == scales).all()
    error = np.abs(dequantize_rows(codes, scales, zero_points, weight.shape[1]).astype(np.float64) - weight)
    of_each = np.repeat(scales, format.block_size, axis=1)[:, : weight.shape[1]]
    assert (error <= of_each * (0.5 + 1e-4) + 256 * SMALLEST).all()


def test_a_scale_beyond_half_floats_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"big: a scale of .* does not fit float16"):
        quantize_rows(np.full((1, 16), 1e38, np.float32), WeightFormat(bits=4), scale_dtype="float16", name="big")


@pytest.mark.parametrize(
    ("bits", "block_size", "symmetric", "scale_dtype", "expected"),
    [
        (4, 32, False, "float32", "f78a75d0e060276c"),
        (4, 128, True, "float16", "3f12102594fabdb8"),
        (8, 32, False, "float32", "e39b022ce0855bda"),
        (8, 64, True, "float16", "64253832951d8253"),
    ],
)
def test_codes_are_what_they_were(bits: int, block_size: int, symmetric: bool, scale_dtype: str, expected: str) -> None:
    """A package that is quantized later has to have the bytes of one that was exported with the recipe."""
    steps = np.arange(4000 * 102, dtype=np.int64).reshape(4000, 102)  # more than one strip
    weight = ((steps * 2654435761 % 65521 - 32760) / 32768).astype(np.float32)
    weight[:, 64:] *= 2.0**-20
    weight[7] = 0
    arrays = quantize_rows(weight, WeightFormat(bits, block_size, symmetric), scale_dtype=scale_dtype)
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16] == expected
