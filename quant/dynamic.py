"""The int8-dynamic linear: 8-bit weights with a scale a channel, activations rounded to 8 bits with a scale a token.

Dims: M tokens, K inputs, N outputs (a row of the weight, also called a channel).

    q = round(x / s) + 128            s [M, 1] = largest |x| of the token / 127
    y = (q - 128) @ W_Q * scales * s  W_Q int8 [K, N], scales [N] = largest |w| of the channel / 127

The product is exact in integers, by the instructions that CPUs have for it (VNNI, AMX). Weights are signed because
those kernels want them so. Without VNNI the sums of two products may overflow 16 bits, so the session is told to be
exact there (runtime/session.py). Nothing is clipped: the largest value of a token and of a channel is exact.

Linears that read the same values share their codes: query, key and value, or gate and up.
"""

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from ..runtime.errors import CheckpointError
from .pack import Piece
from .rtn import Float32

__all__ = ["channel_shapes", "dequantize_channels", "integer_linear", "quantize_channels"]

Int8 = npt.NDArray[np.int8]

_DOMAIN = "vlmport"
_TOP = 127
_SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)  # as quant/rtn.py; kernels flush what is smaller

# The maximum and the minimum take less time than the absolute values, which would have to be written first. A token of
# zeros has the smallest scale: its codes are 128, which stands for 0.
_QUANTIZE_TOKENS = """
<domain: "vlmport", opset_import: ["": 23]>
QuantizeTokens (x) => (codes, scale)
{
    last = Constant <value = int64[1] {-1}> ()
    high = ReduceMax <keepdims = 1> (x, last)
    low = ReduceMin <keepdims = 1> (x, last)
    depth = Neg (low)
    smallest = Constant <value = float {1e-30}> ()
    largest = Max (high, depth, smallest)
    top = Constant <value = float {127.0}> ()
    scale = Div (largest, top)
    scaled = Div (x, scale)
    one = Constant <value = float {1.0}> ()
    middle = Constant <value = uint8 {128}> ()
    codes = QuantizeLinear (scaled, one, middle)
}
"""
_INTEGER_LINEAR = """
<domain: "vlmport", opset_import: ["": 23, "com.microsoft": 1]>
IntegerLinear (codes, scale, weight, weight_scales) => (y)
{
    one = Constant <value = float {1.0}> ()
    middle = Constant <value = uint8 {128}> ()
    product = com.microsoft.MatMulIntegerToFloat (codes, weight, one, weight_scales, middle)
    y = Mul (product, scale)
}
"""


def quantize_channels(W_NK: Float32, *, name: str = "weight") -> tuple[Int8, Float32]:
    """Codes int8 [N, K] in -127..127 and scales float32 [N]; w ~ code * scale, at most half a scale off.

    Channels do not depend on one another: a weight may be quantized in any chunks of rows. Raises CheckpointError
    naming `name` where a value is not finite.
    """
    largest_N = np.maximum(W_NK.max(axis=1, initial=0), -W_NK.min(axis=1, initial=0))
    if not np.isfinite(largest_N).all():
        raise CheckpointError(f"{name}: holds NaN or infinity, which cannot be quantized; mend the checkpoint")
    scale_N = largest_N / np.float32(_TOP)
    scale_N[scale_N < _SMALLEST_SCALE] = 1.0
    codes_NK = W_NK / scale_N[:, None]
    np.rint(codes_NK, out=codes_NK)
    np.clip(codes_NK, -_TOP, _TOP, out=codes_NK)
    return codes_NK.astype(np.int8), scale_N


def dequantize_channels(codes_NK: Int8, scales_N: Float32) -> Float32:
    """What the codes stand for, float32 [N, K]."""
    return codes_NK.astype(np.float32) * scales_N[:, None]


def channel_shapes(num_rows: int, num_columns: int) -> dict[Piece, tuple[int, ...]]:
    """Shapes of the initializers: the codes lie by inputs, [K, N], as MatMulInteger wants them."""
    return {"quantized": (num_columns, num_rows), "scales": (num_rows,)}


def integer_linear(model: ir.Model, linear: ir.Node, pieces: list[ir.Value]) -> ir.Node:
    """The node that takes the place of `linear` (x, W), with `pieces` codes and scales of W; not yet in the graph."""
    _add_functions(model)
    x = linear.inputs[0]
    assert x is not None
    codes, scale = _token_codes(model.graph, x)
    return ir.node("IntegerLinear", [codes, scale, *pieces], domain=_DOMAIN, name=linear.name)


def _token_codes(graph: ir.Graph, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes and scales of the tokens of x, made once, right after x itself."""
    for node in x.consumers():
        if (node.domain, node.op_type) == (_DOMAIN, "QuantizeTokens"):
            return node.outputs[0], node.outputs[1]
    node = ir.node("QuantizeTokens", [x], num_outputs=2, domain=_DOMAIN, name=f"{x.name}_tokens")
    for output, end in zip(node.outputs, ("codes", "scale"), strict=True):
        output.name = f"{x.name}_{end}"
    producer = x.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    return node.outputs[0], node.outputs[1]


def _add_functions(model: ir.Model) -> None:
    if (_DOMAIN, "IntegerLinear", "") in model.functions:
        return
    for text in (_QUANTIZE_TOKENS, _INTEGER_LINEAR):
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(_DOMAIN, 1)
