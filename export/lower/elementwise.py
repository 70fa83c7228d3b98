"""Small semantic operators -> standard ONNX: normalisation, rotary embedding, constants, the last positions."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from .rewriter import attribute, replace_operator

__all__ = ["LowerFloatConstant", "LowerLastPositions", "LowerRMSNorm", "LowerRotary"]


class LowerRMSNorm(InPlacePass):
    """RMSNorm(x, w) -> RMSNormalization with float32 statistics (stash_type 1)."""

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "RMSNorm", _rms_norm))


class LowerRotary(InPlacePass):
    """Rotary(x, cos, sin) -> RotaryEmbedding on tables a token (no position_ids).

    Tables are float32; where x is not, it is rotated in float32 and cast back.
    """

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "Rotary", _rotary))


class LowerFloatConstant(InPlacePass):
    """FloatConstant -> Constant."""

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "FloatConstant", _float_constant))


class LowerLastPositions(InPlacePass):
    """LastPositions(x, n) -> Slice from -n to the end on axis 1; -0 is 0, so n = 0 keeps all."""

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "LastPositions", _last_positions))


def _rms_norm(tape: Tape, node: ir.Node) -> list[ir.Value]:
    epsilon = attribute(node, "epsilon").as_float()
    return [tape.op("RMSNormalization", node.inputs, {"axis": -1, "epsilon": epsilon, "stash_type": 1})]


def _rotary(tape: Tape, node: ir.Node) -> list[ir.Value]:
    x, cos, sin = node.inputs
    assert x is not None
    assert x.dtype is not None
    single = x.dtype == ir.DataType.FLOAT
    x32 = x if single else tape.op("Cast", [x], {"to": ir.DataType.FLOAT})
    heads = attribute(node, "num_heads").as_int()
    rotated = tape.op("RotaryEmbedding", [x32, cos, sin], {"num_heads": heads})
    return [rotated if single else tape.op("Cast", [rotated], {"to": x.dtype})]


def _float_constant(tape: Tape, node: ir.Node) -> list[ir.Value]:
    values = np.array(attribute(node, "values").as_floats(), dtype=np.float32)
    return [tape.op("Constant", [], {"value": ir.tensor(values)})]


def _last_positions(tape: Tape, node: ir.Node) -> list[ir.Value]:
    x, count = node.inputs
    end, axis = (tape.op("Constant", [], {"value_ints": [number]}) for number in (np.iinfo(np.int64).max, 1))
    return [tape.op("Slice", [x, tape.op("Neg", [count]), end, axis])]
