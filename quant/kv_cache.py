"""The key/value cache in 8 bits: codes in the buffers, scales in the graph, found on calibration data.

Dims: G key/value heads, E head size.

    key ~ code * scale        -128 <= code <= 127

com.microsoft.GroupQueryAttention of ONNX Runtime 1.31 and later reads and writes such a cache itself, in place: a
quarter of the bytes of float32. Scales are of a tensor [1] or of a channel [G * E], over tokens; both are constants, so
what is larger than anything that calibration saw is clipped.
"""

import base64
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..runtime.errors import RecipeError
from .recipe import CacheFormat, Target
from .rewrite import is_linear
from .rtn import Float32

__all__ = ["cache_scales", "note_cache_factors", "quantize_cache"]

_TOP = 127
_SMALLEST = 1e-8  # of a scale: a channel that is always 0 has some
_NUM_INPUTS = 14  # of GroupQueryAttention, with the two scales behind all others
_TYPES = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL"}


def cache_scales(largest_GE: Float32, format: CacheFormat) -> Float32:
    """Scales [1] or [G * E] from the largest absolute value of each channel, [G, E]."""
    largest = largest_GE.max().reshape(1) if format.scales == "tensor" else largest_GE.ravel()
    return np.maximum(largest / _TOP, _SMALLEST).astype(np.float32)


def quantize_cache(
    model: ir.Model, largest: Sequence[tuple[Float32, Float32]], format: CacheFormat, target: Target
) -> None:
    """Makes the cache of a decoder's graph int8, in place; `largest` has the keys' and values' of each layer, [G, E].

    The scales stand in the model's metadata too, by the name of the input, for those who look into a cache.
    Raises RecipeError where the kernels are missing or the attention is another one.
    """
    if target != "cpu":
        raise RecipeError(f"cache of {format.bits} bits: for target cpu only; leave it out")
    layers = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if not layers or len(layers) != len(largest):
        raise RecipeError("cache of 8 bits: this decoder has layers whose attention does not take it; leave it out")
    for node, ranges in zip(layers, largest, strict=True):
        scales: list[ir.Value] = []
        for index, largest_GE in zip((3, 4), ranges, strict=True):
            past, present = node.inputs[index], node.outputs[index - 2]
            assert past is not None
            assert past.is_graph_input(), past.name
            assert present.is_graph_output(), present.name
            array = cache_scales(largest_GE, format)
            name = f"{past.name}.scale"
            scale = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            scale.shape, scale.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
            model.graph.initializers.add(scale)
            model.metadata_props[name] = base64.b64encode(array.tobytes()).decode()
            past.type = present.type = ir.TensorType(ir.DataType.INT8)
            scales.append(scale)
        node.resize_inputs(_NUM_INPUTS)
        for index, scale in zip((_NUM_INPUTS - 2, _NUM_INPUTS - 1), scales, strict=True):
            node.replace_input_with(index, scale)
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes[name] = ir.AttrString(name, _TYPES[format.scales])
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", format.bits)


def note_cache_factors(model: ir.Model, column_factors: Mapping[str, Float32]) -> None:
    """Tells those who look into a cache what its values are divided by: the factors [G * E] of what reads them.

    They stand in the model's metadata; `column_factors` [K] are by weight, and come on top of those that stand there.
    """
    for node in model.graph:
        past = node.inputs[4] if node.op_type == "GroupQueryAttention" and len(node.inputs) > 4 else None
        if past is None:
            continue
        weights = [use.node.inputs[1] for use in node.outputs[0].uses() if is_linear(use.node)]
        names = [str(weight.name) for weight in weights if weight is not None]
        columns_K = next((column_factors[name] for name in names if name in column_factors), None)
        if columns_K is None:
            continue
        num_heads, num_kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        factors = columns_K.reshape(num_kv_heads, num_heads // num_kv_heads, -1)[:, 0].ravel()
        key = f"{past.name}.factors"
        if (before := model.metadata_props.get(key)) is not None:
            factors = np.frombuffer(base64.b64decode(before), np.float32) * factors
        model.metadata_props[key] = base64.b64encode(factors.astype(np.float32).tobytes()).decode()
