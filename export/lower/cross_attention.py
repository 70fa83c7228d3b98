"""SegmentCrossAttention: the queries of each segment over the keys of the same segment, in any two lengths.

CPU: unmasked MultiHeadAttention a segment, as for attention within segments. CUDA: its packed kernel wants as many
queries as keys, so one masked softmax over all pairs: queries are few (one or some dozens a segment).
"""

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from ..layers.semantic import DOMAIN
from .rewriter import MICROSOFT, attribute, replace_operator

__all__ = ["LoopCrossAttention", "MaskCrossAttention"]

_OPERATOR = "SegmentCrossAttention"
_FUNCTION = """
<domain: "vlmport", opset_import: ["": 23, "com.microsoft": 1]>
SegmentCrossAttention <num_heads, scale> (q, k, v, cu_queries, cu_keys) => (out)
{
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    q_bounds = Cast <to = 7> (cu_queries)
    k_bounds = Cast <to = 7> (cu_keys)
    q_starts = Slice (q_bounds, zero, minus_one, zero)
    q_stops = Slice (q_bounds, one, end, zero)
    k_starts = Slice (k_bounds, zero, minus_one, zero)
    k_stops = Slice (k_bounds, one, end, zero)
    num_segments = Shape (q_starts)
    trips = Squeeze (num_segments)
    q3 = Unsqueeze (q, zero)
    k3 = Unsqueeze (k, zero)
    v3 = Unsqueeze (v, zero)
    condition = Constant <value = bool {1}> ()
    rows = SequenceEmpty <dtype = 1> ()
    segments = Loop (trips, condition, rows) <body = one_segment (int64 i, bool going, seq(float[1, s, d]) done)
        => (bool still_going, seq(float[1, s, d]) grown)
    {
        still_going = Identity (going)
        index = Unsqueeze (i, zero)
        q_start = Gather (q_starts, index)
        q_stop = Gather (q_stops, index)
        k_start = Gather (k_starts, index)
        k_stop = Gather (k_stops, index)
        q_segment = Slice (q3, q_start, q_stop, one)
        k_segment = Slice (k3, k_start, k_stop, one)
        v_segment = Slice (v3, k_start, k_stop, one)
        y = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
            (q_segment, k_segment, v_segment)
        grown = SequenceInsert (done, y)
    }>
    joined = ConcatFromSequence <axis = 1> (segments)
    out = Squeeze (joined, zero)
}
"""


class LoopCrossAttention(InPlacePass):
    """SegmentCrossAttention -> a call of a function whose body loops over the segments (CPU)."""

    def call(self, model: ir.Model) -> PassResult:
        if not any(node.domain == DOMAIN and node.op_type == _OPERATOR for node in model.graph):
            return PassResult(model, False)
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_FUNCTION))
        model.functions[function.identifier()] = function
        model.graph.opset_imports[MICROSOFT] = 1
        return PassResult(model, True)


class MaskCrossAttention(InPlacePass):
    """SegmentCrossAttention -> scores of all pairs, a softmax over those of the same segment, in float32 (CUDA)."""

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, _OPERATOR, _masked))


def _masked(tape: Tape, node: ir.Node) -> list[ir.Value]:
    q, k, v, cu_queries, cu_keys = (value for value in node.inputs if value is not None)
    heads, scale = attribute(node, "num_heads").as_int(), attribute(node, "scale").as_float()
    split = _ints(tape, 0, heads, -1)
    q_NHE, k_MHE, v_MHE = (tape.op("Reshape", [x, split]) for x in (q, k, v))
    q32 = tape.op("Cast", [tape.op("Transpose", [q_NHE], {"perm": [1, 0, 2]})], {"to": ir.DataType.FLOAT})
    k32 = tape.op("Cast", [tape.op("Transpose", [k_MHE], {"perm": [1, 2, 0]})], {"to": ir.DataType.FLOAT})
    scores_HNM = tape.op("Mul", [tape.op("MatMul", [q32, k32]), _float(tape, scale)])
    mine = tape.op("Equal", [_segments(tape, q, cu_queries, 1), _segments(tape, k, cu_keys, 0)])
    seen = tape.op("Where", [mine, scores_HNM, _float(tape, -1e30)])
    weights = tape.op("CastLike", [tape.op("Softmax", [seen], {"axis": -1}), v])
    out_HNE = tape.op("MatMul", [weights, tape.op("Transpose", [v_MHE], {"perm": [1, 0, 2]})])
    out = tape.op("Transpose", [out_HNE], {"perm": [1, 0, 2]})
    return [tape.op("Reshape", [out, _ints(tape, 0, -1)])]


def _segments(tape: Tape, rows: ir.Value, bounds: ir.Value, axis: int) -> ir.Value:
    """Number of the segment of each row, int64 [N, 1] (axis 1) or [1, N] (axis 0): how many segments have ended."""
    one, end = _ints(tape, 1), _ints(tape, 2**63 - 1)
    stops = tape.op("Slice", [tape.op("Cast", [bounds], {"to": ir.DataType.INT64}), one, end])
    zero, step = (tape.op("Constant", [], {"value_int": number}) for number in (0, 1))
    length = tape.op("Squeeze", [tape.op("Shape", [rows], {"start": 0, "end": 1})])
    place = tape.op("Unsqueeze", [tape.op("Range", [zero, length, step]), _ints(tape, 1)])
    ended = tape.op("Cast", [tape.op("GreaterOrEqual", [place, stops])], {"to": ir.DataType.INT64})
    return tape.op("Unsqueeze", [tape.op("ReduceSum", [ended, _ints(tape, 1)], {"keepdims": 0}), _ints(tape, axis)])


def _ints(tape: Tape, *values: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": list(values)})


def _float(tape: Tape, value: float) -> ir.Value:
    return tape.op("Constant", [], {"value_float": value})
