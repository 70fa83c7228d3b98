"""SegmentCrossAttention: the queries of each segment over the keys of the same segment, in any two lengths.

CPU: unmasked MultiHeadAttention a segment, as for attention within segments. CUDA: its packed kernel wants as many
queries as keys, so all segments are padded to the longest, and one masked softmax goes over them.
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
    """SegmentCrossAttention -> segments padded to the longest, a softmax in float32 over their own keys (CUDA).

    So scores are as many as the segments times their longest lengths; over all pairs they would grow with its square.
    """

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, _OPERATOR, _masked))


def _masked(tape: Tape, node: ir.Node) -> list[ir.Value]:
    """T segments, L places of the longest, H heads of size E."""
    q, k, v, cu_queries, cu_keys = (value for value in node.inputs if value is not None)
    heads, scale = attribute(node, "num_heads").as_int(), attribute(node, "scale").as_float()
    q_index, q_own = _padded(tape, cu_queries)
    k_index, k_own = _padded(tape, cu_keys)
    split = _ints(tape, 0, 0, heads, -1)
    q_TLHE, k_TLHE, v_TLHE = (
        tape.op("Reshape", [tape.op("Gather", [x, index]), split])
        for x, index in ((q, q_index), (k, k_index), (v, k_index))
    )
    q32 = tape.op("Cast", [tape.op("Transpose", [q_TLHE], {"perm": [0, 2, 1, 3]})], {"to": ir.DataType.FLOAT})
    k32 = tape.op("Cast", [tape.op("Transpose", [k_TLHE], {"perm": [0, 2, 3, 1]})], {"to": ir.DataType.FLOAT})
    scores_THLL = tape.op("Mul", [tape.op("MatMul", [q32, k32]), _float(tape, scale)])
    mask = tape.op("Less", [_ints(tape, 0), tape.op("Unsqueeze", [k_own, _ints(tape, 1, 2)])])
    seen = tape.op("Where", [mask, scores_THLL, _float(tape, -1e30)])
    weights = tape.op("CastLike", [tape.op("Softmax", [seen], {"axis": -1}), v])
    out_THLE = tape.op("MatMul", [weights, tape.op("Transpose", [v_TLHE], {"perm": [0, 2, 1, 3]})])
    out_TLHE = tape.op("Transpose", [out_THLE], {"perm": [0, 2, 1, 3]})
    rows = tape.op("Reshape", [out_TLHE, tape.op("Concat", [_ints(tape, -1), _width(tape, q)], {"axis": 0})])
    places = tape.op("NonZero", [tape.op("Less", [_ints(tape, 0), tape.op("Reshape", [q_own, _ints(tape, -1)])])])
    return [tape.op("Gather", [rows, tape.op("Reshape", [places, _ints(tape, -1)])])]


def _width(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.op("Shape", [x], {"start": 1, "end": 2})


def _padded(tape: Tape, bounds: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(row of each place of each segment, is it the segment's own: 1 or 0), int64 [T, L]; padding repeats a row."""
    wide = tape.op("Cast", [bounds], {"to": ir.DataType.INT64})
    zero, one, end = _ints(tape, 0), _ints(tape, 1), _ints(tape, 2**63 - 1)
    starts = tape.op("Slice", [wide, zero, _ints(tape, -1)])
    lengths = tape.op("Sub", [tape.op("Slice", [wide, one, end]), starts])
    first, step = (tape.op("Constant", [], {"value_int": number}) for number in (0, 1))
    longest = tape.op("ReduceMax", [lengths], {"keepdims": 0})
    places = tape.op("Unsqueeze", [tape.op("Range", [first, longest, step]), zero])
    real = tape.op("Less", [places, tape.op("Unsqueeze", [lengths, one])])
    own = tape.op("Cast", [real], {"to": ir.DataType.INT64})
    back = tape.op("Mul", [own, tape.op("Sub", [zero, places])])  # from the start, downwards
    return tape.op("Sub", [tape.op("Unsqueeze", [starts, one]), back]), own


def _ints(tape: Tape, *values: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": list(values)})


def _float(tape: Tape, value: float) -> ir.Value:
    return tape.op("Constant", [], {"value_float": value})
