"""Linear and Embedding -> one node each on a weight in checkpoint layout, so that a recipe can find and replace it."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from .rewriter import MICROSOFT, replace_operator

__all__ = ["LowerEmbedding", "LowerLinear"]


class LowerLinear(InPlacePass):
    """Linear(x, W [N, K]) -> FusedMatMul(x, W, transB=1).

    As fast as MatMul with a transposed weight (ONNX Runtime packs either at load), and the weight keeps the
    checkpoint's layout, so that it streams and quantizes row by row.
    """

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "Linear", _linear))


class LowerEmbedding(InPlacePass):
    """Embedding(W [V, D], ids) -> Gather(W, ids) on axis 0."""

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, replace_operator(model, "Embedding", _embedding))


def _linear(tape: Tape, node: ir.Node) -> list[ir.Value]:
    return [tape.op("FusedMatMul", node.inputs, {"transB": 1}, domain=MICROSOFT, version=1)]


def _embedding(tape: Tape, node: ir.Node) -> list[ir.Value]:
    return [tape.op("Gather", node.inputs, {"axis": 0})]
