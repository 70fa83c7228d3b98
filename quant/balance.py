"""Balancing: large channels of a norm move into the weights of the linears behind it, where they cost nothing.

Dims: N outputs and K inputs of a linear; the norm has K channels.

    y = norm(x) * gamma + beta,  y @ W.T    ->    y' = norm(x) * (gamma / s) + beta / s,  y' @ (W * s).T
    s [K] = sqrt((|gamma| + |beta|) / largest |w| of the input), to the nearest power of two

An int8-dynamic linear rounds a token with one scale, so a few large channels leave the others few codes, while a weight
has a scale for each of its N channels. This is SmoothQuant (arXiv 2211.10438) at strength 0.5, with |gamma| + |beta| in
place of measured activations, so that no data is needed; outliers of the stream itself stay what they are. Powers of
two round nothing: in float the function is the same to the bit.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .data_file import WeightSource
from .rewrite import StoredTensor
from .rtn import Float32

__all__ = ["BalancedSource", "balance", "balancing_factors"]

# Inputs of a norm that have a value a channel: the weight and, where there may be one, the bias.
_NORM_INPUTS = {("", "RMSNormalization"): (1,), ("", "LayerNormalization"): (1, 2)}
_LARGEST_EXPONENT = 16  # of a factor; channels further apart than that are as good as zero
_CHUNK_BYTES = 4 << 20  # float32 bytes that are read at once


@dataclass(frozen=True)
class BalancedSource:
    """A WeightSource whose weights are those of `source`, their columns multiplied by `factors`, by parameter [K]."""

    source: WeightSource
    factors: dict[str, Float32]

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self.source.shape(parameter)

    def origin(self, parameter: str) -> Hashable:
        origin, factors = self.source.origin(parameter), self.factors.get(parameter)
        return origin if factors is None else (origin, factors.tobytes())

    def rows(self, parameter: str, start: int, stop: int) -> Float32:
        rows, factors = self.source.rows(parameter, start, stop), self.factors.get(parameter)
        return rows if factors is None else rows * factors


def balance(
    model: ir.Model, stored: tuple[StoredTensor, ...], source: WeightSource
) -> tuple[tuple[StoredTensor, ...], WeightSource]:
    """Balances, in a graph that `rewrite` gave, each norm that only linears read whose format says `balance`.

    The norms' values become constants of the graph, whether they were parameters or constants before. Gives what else
    is to be stored, and the source of it; weights are read once more here, some rows at a time.
    """
    by_name = {tensor.name: tensor for tensor in stored if tensor.format is not None and tensor.format.balance}
    factors: dict[str, Float32] = {}
    balanced: set[str] = set()
    for node in model.graph if by_name else ():
        weights = _weights_behind(node, by_name)
        values = _channel_values(model.graph, node)
        if not weights or not values:
            continue
        largest_K = np.maximum.reduce([_largest_of_inputs(weight, source) for weight in weights])
        arrays = [_read(value, source) for value in values]
        factors_K = balancing_factors(np.add.reduce([np.abs(array_K) for array_K in arrays]), largest_K)
        for value, array_K in zip(values, arrays, strict=True):
            value.const_value = ir.Tensor(array_K / factors_K, name=value.name)
            balanced.add(str(value.name))
        factors |= dict.fromkeys(weights, factors_K)
    if not factors:
        return stored, source
    return tuple(tensor for tensor in stored if tensor.name not in balanced), BalancedSource(source, factors)


def balancing_factors(reach_K: Float32, largest_K: Float32) -> Float32:
    """s [K] from |gamma| + |beta| and the largest |w| of each input; 1 where either is 0 or not finite."""
    factors_K = np.ones_like(reach_K)
    usable = np.isfinite(reach_K) & np.isfinite(largest_K) & (reach_K != 0) & (largest_K != 0)
    if usable.any():
        exponents = (np.log2(reach_K[usable]) - np.log2(largest_K[usable])) / 2
        # One factor for all channels changes nothing, so the middle one is 1 and values keep their size.
        exponents = np.clip(np.rint(exponents - np.median(exponents)), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        factors_K[usable] = np.ldexp(np.float32(1), exponents.astype(np.int32))
    return factors_K


def _weights_behind(node: ir.Node, by_name: dict[str, StoredTensor]) -> tuple[str, ...]:
    """The parameters of the linears that read a norm, or none where anything else reads it or them."""
    if (node.domain, node.op_type) not in _NORM_INPUTS or node.outputs[0].is_graph_output():
        return ()
    readers = node.outputs[0].consumers()
    if len(readers) != 1 or readers[0].op_type != "QuantizeTokens":
        return ()
    linears = {user for output in readers[0].outputs for user in output.consumers()}
    weights: dict[str, None] = {}
    for linear in sorted(linears, key=lambda linear: str(linear.name)):
        codes = linear.inputs[2] if linear.op_type == "IntegerLinear" else None
        if codes is None or codes.name not in by_name or not linears.issuperset(codes.consumers()):
            return ()
        weights[by_name[str(codes.name)].parameter] = None
    return tuple(weights)


def _channel_values(graph: ir.Graph, node: ir.Node) -> list[ir.Value]:
    """The norm's weight and bias, or none where one is not an initializer of its own with a float32 a channel."""
    inputs = [node.inputs[i] for i in _NORM_INPUTS.get((node.domain, node.op_type), ()) if i < len(node.inputs)]
    values = [value for value in inputs if value is not None]
    for value in values:
        is_own = value.name in graph.initializers and len(value.uses()) == 1 and not value.is_graph_input()
        if not is_own or value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 1:
            return []
    return values


def _read(value: ir.Value, source: WeightSource) -> Float32:
    """The values of a norm's weight or bias [K]: a parameter of a checkpoint, or a constant of a stored graph."""
    if value.const_value is not None:
        return value.const_value.numpy()
    name = str(value.name)
    return source.rows(name, 0, source.shape(name)[0])


def _largest_of_inputs(weight: str, source: WeightSource) -> Float32:
    """The largest |w| of each input of a weight, [K]."""
    num_rows, num_columns = source.shape(weight)
    largest_K = np.zeros(num_columns, np.float32)
    step = max(1, _CHUNK_BYTES // (4 * num_columns))
    for start in range(0, num_rows, step):
        rows = source.rows(weight, start, min(start + step, num_rows))
        np.maximum(largest_K, np.maximum(rows.max(axis=0), -rows.min(axis=0)), out=largest_K)
    return largest_K
