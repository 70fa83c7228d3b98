"""Making a lowered graph small and its text the same on every run."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from onnxscript.optimizer import fold_constants_ir

__all__ = ["FoldSmallConstants", "Tidy"]

_SMALL = 1024  # bytes: shapes and indices, never a weight


class FoldSmallConstants(InPlacePass):
    """Folds the index arithmetic that tracing leaves behind. Weights have no values here, and are never read."""

    def call(self, model: ir.Model) -> PassResult:
        result = fold_constants_ir(model, onnx_shape_inference=False, input_size_limit=_SMALL, output_size_limit=_SMALL)
        return PassResult(model, result.modified)


class Tidy(InPlacePass):
    """Drops unused nodes and opsets, doc strings and the tracer's metadata, and shapes of inner values.

    Inner shapes carry the tracer's own dim names, which differ between runs; runtimes infer their own.
    """

    def call(self, model: ir.Model) -> PassResult:
        RemoveUnusedNodesPass()(model)
        RemoveUnusedOpsetsPass()(model)
        kept = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
        for node in model.graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if value not in kept:
                    value.shape = None
        for value in kept:
            value.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.metadata_props.clear()
        model.doc_string = model.graph.doc_string = None
        return PassResult(model, True)
