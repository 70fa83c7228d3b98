"""Lowerings of the cuda target alone: without them ONNX Runtime copies between GPU and CPU inside the decoder.

A copy in the graph costs a wait of the host a step, and rules CUDA graphs out.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from .rewriter import replace_operator

__all__ = ["LastPositionsOnHost"]


class LastPositionsOnHost(InPlacePass):
    """LastPositions(x, n) -> Slice from (S - n) - S to the end on axis 1, S the length of x.

    Slice reads its start on the host. ONNX Runtime computes Neg(n) on the GPU and copies it back, but keeps on the
    host whatever comes of a Shape; the detour over S is that and nothing else. The start stays -n, so 0 keeps all and
    more than S are S, as on the CPU.
    """

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "LastPositions", _last_positions))


def _last_positions(tape: Tape, node: ir.Node) -> list[ir.Value]:
    x, count = node.inputs
    length = tape.op("Shape", [x], {"start": 1, "end": 2})
    start = tape.op("Sub", [tape.op("Sub", [length, count]), length])
    end, axis = (tape.op("Constant", [], {"value_ints": [number]}) for number in (np.iinfo(np.int64).max, 1))
    return [tape.op("Slice", [x, start, end, axis])]
