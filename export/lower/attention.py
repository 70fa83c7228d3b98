"""The two attentions -> the fastest operators that each target has for them (measured in docs/architecture.md).

CPU: unmasked MultiHeadAttention takes a memory-light path and is run a segment at a time. CUDA:
PackedMultiHeadAttention takes all segments in one call. Both: GroupQueryAttention for the causal part, which can grow
its cache in place.
"""

import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from ..layers.semantic import DOMAIN
from .rewriter import MICROSOFT, attribute, replace_operator

__all__ = ["LoopSegmentAttention", "LowerCachedAttention", "PackSegmentAttention", "token_offset"]

# Neighbours of equal length make a run, and a run is one call with a batch axis: the windows of an image, the frames of
# a clip. Where all segments are equal there is one run, and nothing is sliced, collected or joined.
_SEGMENT_FUNCTION = """
<domain: "vlmport", opset_import: ["": 23, "com.microsoft": 1]>
SegmentAttention <num_heads, scale> (q, k, v, cu_seqlens) => (out)
{
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    bounds = Cast <to = 7> (cu_seqlens)
    starts = Slice (bounds, zero, minus_one, zero)
    stops = Slice (bounds, one, end, zero)
    lengths = Sub (stops, starts)
    first_lengths = Slice (lengths, zero, minus_one, zero)
    next_lengths = Slice (lengths, one, end, zero)
    same = Equal (first_lengths, next_lengths)
    differs = Not (same)
    change_2d = NonZero (differs)
    change = Reshape (change_2d, minus_one)
    next_first = Add (change, one)
    firsts = Concat <axis = 0> (zero, next_first)
    num_segments = Shape (lengths)
    last = Sub (num_segments, one)
    lasts = Concat <axis = 0> (change, last)
    run_starts = Gather (starts, firsts)
    run_stops = Gather (stops, lasts)
    run_lengths = Gather (lengths, firsts)
    width = Shape <start = 1, end = 2> (q)
    runs_1 = Shape (firsts)
    num_runs = Squeeze (runs_1)
    flat = Concat <axis = 0> (minus_one, width)
    single = Constant <value = int64 {1}> ()
    is_one_run = Equal (num_runs, single)
    out = If (is_one_run) <then_branch = one_run () => (float[n, d] together)
    {
        batched = Concat <axis = 0> (minus_one, run_lengths, width)
        q_batch = Reshape (q, batched)
        k_batch = Reshape (k, batched)
        v_batch = Reshape (v, batched)
        y_batch = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
            (q_batch, k_batch, v_batch)
        together = Reshape (y_batch, flat)
    }, else_branch = several_runs () => (float[m, d] joined)
    {
        condition = Constant <value = bool {1}> ()
        none = SequenceEmpty <dtype = 1> ()
        rows = Loop (num_runs, condition, none) <body = one_of_them (int64 i, bool going, seq(float[s, d]) done)
            => (bool still_going, seq(float[s, d]) grown)
        {
            still_going = Identity (going)
            index = Unsqueeze (i, zero)
            start = Gather (run_starts, index)
            stop = Gather (run_stops, index)
            length = Gather (run_lengths, index)
            shape = Concat <axis = 0> (minus_one, length, width)
            q_rows = Slice (q, start, stop, zero)
            k_rows = Slice (k, start, stop, zero)
            v_rows = Slice (v, start, stop, zero)
            q_run = Reshape (q_rows, shape)
            k_run = Reshape (k_rows, shape)
            v_run = Reshape (v_rows, shape)
            y_run = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
                (q_run, k_run, v_run)
            y_rows = Reshape (y_run, flat)
            grown = SequenceInsert (done, y_rows)
        }>
        joined = ConcatFromSequence <axis = 0> (rows)
    }>
}
"""


class LoopSegmentAttention(InPlacePass):
    """SegmentAttention -> a call of a function whose body loops over runs of equal segments (CPU)."""

    def call(self, model: ir.Model) -> PassResult:
        calls = [node for node in model.graph if node.domain == DOMAIN and node.op_type == "SegmentAttention"]
        if not calls:
            return PassResult(model, False)
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_SEGMENT_FUNCTION))
        model.functions[function.identifier()] = function
        model.graph.opset_imports[MICROSOFT] = 1
        return PassResult(model, True)


class PackSegmentAttention(InPlacePass):
    """SegmentAttention -> PackedMultiHeadAttention (CUDA), whose offsets are computed once for each set of bounds."""

    def call(self, model: ir.Model) -> PassResult:
        offsets: dict[ir.Value, ir.Value] = {}

        def build(tape: Tape, node: ir.Node) -> list[ir.Value]:
            q, k, v, bounds = node.inputs
            assert bounds is not None
            if bounds not in offsets:
                offsets[bounds] = token_offset(tape, bounds)
            attributes = {name: attribute(node, name) for name in ("num_heads", "scale")}
            inputs = [q, k, v, None, offsets[bounds], bounds]
            return [tape.op("PackedMultiHeadAttention", inputs, attributes, domain=MICROSOFT, version=1)]

        return PassResult(model, replace_operator(model, "SegmentAttention", build))


class LowerCachedAttention(InPlacePass):
    """CachedAttention -> GroupQueryAttention; lengths come from the attention mask, once a graph."""

    def call(self, model: ir.Model) -> PassResult:
        lengths: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

        def build(tape: Tape, node: ir.Node) -> list[ir.Value]:
            mask = node.inputs[5]
            assert mask is not None
            if mask not in lengths:
                lengths[mask] = _lengths(tape, mask)
            attributes = {name: attribute(node, name) for name in ("num_heads", "kv_num_heads", "scale")}
            inputs = [*node.inputs[:5], *lengths[mask]]
            values = tape.op_multi_out(
                "GroupQueryAttention", inputs, attributes, num_outputs=3, domain=MICROSOFT, version=1
            )
            return list(values)

        return PassResult(model, replace_operator(model, "CachedAttention", build))


def _lengths(tape: Tape, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(index of the last real token a row int32 [B], total length int32 []) of a mask int64 [B, T]."""
    one = tape.op("Constant", [], {"value_ints": [1]})
    real = tape.op("ReduceSum", [mask, one], {"keepdims": 0})
    last = tape.op("Cast", [tape.op("Sub", [real, one])], {"to": ir.DataType.INT32})
    total = tape.op("Squeeze", [tape.op("Shape", [mask], {"start": 1, "end": 2})])
    return last, tape.op("Cast", [total], {"to": ir.DataType.INT32})


def token_offset(tape: Tape, bounds: ir.Value) -> ir.Value:
    """token_offset int32 [segments, longest]: slots of a padded layout, the real ones first, then the padding."""

    def ints(*values: int) -> ir.Value:
        return tape.op("Constant", [], {"value_ints": list(values)})

    wide = tape.op("Cast", [bounds], {"to": ir.DataType.INT64})
    end = ints(2**63 - 1)
    lengths = tape.op("Sub", [tape.op("Slice", [wide, ints(1), end]), tape.op("Slice", [wide, ints(0), ints(-1)])])
    longest = tape.op("ReduceMax", [lengths], {"keepdims": 0})
    zero, one = (tape.op("Constant", [], {"value_int": number}) for number in (0, 1))
    columns = tape.op("Unsqueeze", [tape.op("Range", [zero, longest, one]), ints(0)])
    real = tape.op("Less", [columns, tape.op("Unsqueeze", [lengths, ints(1)])])
    flat = tape.op("Reshape", [real, ints(-1)])
    slots = [tape.op("NonZero", [mask]) for mask in (flat, tape.op("Not", [flat]))]
    ordered = tape.op("Reshape", [tape.op("Concat", slots, {"axis": 1}), tape.op("Shape", [real])])
    return tape.op("Cast", [ordered], {"to": ir.DataType.INT32})
