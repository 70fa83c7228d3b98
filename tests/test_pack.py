"""Packed bytes, checked against the kernels of ONNX Runtime that read them."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from vlmport.quant.pack import gather_shapes, linear_shapes, pack_codes, pack_zero_points
from vlmport.quant.recipe import WeightFormat
from vlmport.quant.rtn import dequantize_rows, quantize_rows
from vlmport.runtime.errors import RecipeError

random = np.random.default_rng(0)
# Every number of bits with every block that has a kernel.
FORMATS = [(bits, block) for bits in (2, 4, 8) for block in (16, 32, 64, 128) if bits > 2 or block > 16]
# N odd, K no multiple of the block, K below one block: MLP widths of real vision towers are 3420 and such.
SHAPES = [(7, 108), (33, 102), (64, 3420), (5, 64), (3, 16)]


def run(op: str, inputs: list[np.ndarray], feed: np.ndarray, feed_index: int, attributes: dict) -> np.ndarray:
    """One node on the CPU; `feed` goes in at `feed_index`, the other inputs are initializers."""
    x = ir.Value(name="x", shape=ir.Shape([None] * feed.ndim), type=ir.TensorType(ir.DataType.from_numpy(feed.dtype)))
    values = [
        ir.Value(
            name=f"w{i}",
            shape=ir.Shape(a.shape),
            type=ir.TensorType(ir.DataType.from_numpy(a.dtype)),
            const_value=ir.Tensor(a, name=f"w{i}"),
        )
        for i, a in enumerate(inputs)
    ]
    node = ir.node(op, [*values[:feed_index], x, *values[feed_index:]], attributes, domain="com.microsoft")
    scales = next(a for a in inputs if a.dtype != np.uint8)
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(scales.dtype))
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports=opsets, name="g")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": feed})[0]


def quantized(
    num_rows: int, num_columns: int, format: WeightFormat, dtype: str = "float32"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What a weight stands for, and its codes, scales and zero points."""
    weight = random.standard_normal((num_rows, num_columns)).astype(np.float32)
    codes, scales, zero_points = quantize_rows(weight, format, scale_dtype=dtype)
    return dequantize_rows(codes, scales, zero_points, num_columns), [codes, scales.astype(dtype), zero_points]


def as_stored(arrays: list[np.ndarray], shapes: dict, format: WeightFormat, num_columns: int) -> list[np.ndarray]:
    codes, scales, zero_points = arrays
    packed = [pack_codes(codes, format, num_columns), scales, pack_zero_points(zero_points, format)]
    return [array.reshape(shape) for array, shape in zip(packed, shapes.values(), strict=False)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple[int, int], bits: int, block_size: int, symmetric: bool) -> None:
    """Level 0 computes what the codes stand for, to float32 noise. Level 4 rounds activations to 8 bits a block."""
    num_rows, num_columns = shape
    format = WeightFormat(bits, block_size, symmetric)
    weight, arrays = quantized(num_rows, num_columns, format)
    shapes = linear_shapes(num_rows, num_columns, format)
    padded = arrays[0].shape[1]
    stored = as_stored(arrays, shapes, format, padded)
    x = random.standard_normal((5, num_columns)).astype(np.float32)
    attributes = {"K": num_columns, "N": num_rows, "bits": bits, "block_size": block_size}
    expected = x @ weight.T
    size = np.abs(x) @ np.abs(weight.T)  # error bounds go by the sum of magnitudes, which does not cancel
    exact = run("MatMulNBits", stored, x, 0, attributes | {"accuracy_level": 0})
    assert (np.abs(exact - expected) / size).max() < 2e-6
    level_4 = run("MatMulNBits", stored, x, 0, attributes | {"accuracy_level": 4})
    assert (np.abs(level_4 - expected) / size).max() < 1e-2
    one_row = run("MatMulNBits", stored, x[:1], 0, attributes | {"accuracy_level": 4})
    assert (np.abs(one_row - expected[:1]) / size[:1]).max() < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding(shape: tuple[int, int], bits: int, block_size: int, symmetric: bool, dtype: str) -> None:
    num_rows, num_columns = shape[0], shape[1] // 4 * 4
    format = WeightFormat(bits, block_size, symmetric)
    table, arrays = quantized(num_rows, num_columns, format, dtype)
    stored = as_stored(arrays, gather_shapes(num_rows, num_columns, format, "table"), format, num_columns)
    ids = np.array([[0, num_rows - 1, 2], [1, 1, 0]])
    attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": block_size}
    rows = run("GatherBlockQuantized", stored, ids, 1, attributes)
    np.testing.assert_allclose(rows, table[ids].astype(dtype), atol=0 if dtype == "float32" else 4e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_in_half_floats(bits: int) -> None:
    format = WeightFormat(bits)
    weight, arrays = quantized(33, 102, format, "float16")
    stored = as_stored(arrays, linear_shapes(33, 102, format), format, 128)
    x = random.standard_normal((5, 102)).astype(np.float16)
    attributes = {"K": 102, "N": 33, "bits": bits, "block_size": 32, "accuracy_level": 4}
    expected = x.astype(np.float32) @ weight.T
    size = np.abs(x.astype(np.float32)) @ np.abs(weight.T)
    assert (np.abs(run("MatMulNBits", stored, x, 0, attributes) - expected) / size).max() < 1e-2


def test_bytes_by_hand() -> None:
    format = WeightFormat(bits=4, block_size=16)
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
    assert pack_codes(codes, format, 16)[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert pack_zero_points(np.array([[1, 2, 3]], np.uint8), format).tolist() == [[0x21, 0x03]]
    assert pack_zero_points(np.array([[1, 200, 3]], np.uint8), WeightFormat(bits=8)).tolist() == [[1, 200, 3]]


def test_two_bits_by_hand() -> None:
    format = WeightFormat(bits=2)
    assert pack_codes(np.array([[3, 0, 1, 2, 0, 1, 2, 3]], np.uint8), format, 8).tolist() == [[0b10010011, 0b11100100]]
    assert pack_zero_points(np.array([[1, 2, 3, 0, 2]], np.uint8), format).tolist() == [[0b00111001, 0b10]]


def test_a_table_of_half_bytes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"embed\.weight: rows of 33 values do not fill whole bytes with 4 bits"):
        gather_shapes(10, 33, WeightFormat(bits=4), "embed.weight")
