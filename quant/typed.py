"""Dtypes of every value of a graph, as ONNX infers them."""

import onnx.shape_inference
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

__all__ = ["typed"]

_SMALL_BYTES = 1024  # constants up to this size stay: shapes follow from them


def typed(model: ir.Model) -> ir.Model:
    """The graph without its weights, local functions put in place, with a dtype for every value."""
    model = model.clone()
    InlinePass()(model)
    weights = [value for value in model.graph.initializers.values() if value.const_value is None or _is_large(value)]
    for value in weights:
        del model.graph.initializers[str(value.name)]
        value.const_value = None
        if value not in model.graph.inputs:
            model.graph.inputs.append(value)
    inferred = onnx.shape_inference.infer_shapes(ir.serde.serialize_model(model))
    return ir.serde.deserialize_model(inferred)


def _is_large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes > _SMALL_BYTES
