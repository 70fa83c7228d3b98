"""Values that a recipe has scaled: factors a channel that moved from what writes a value into the linears that read it.

Balancing and AWQ divide a writer by factors s [C] and multiply the columns of its readers: the same function, but what
lies between has another scale than the reference's. Of values that a cache keeps the graph notes them; of others they
are told from the weights of both sides, which have to agree: a reader's columns are s times the reference's, a writer's
rows 1 / s times. Where only one of them is scaled nothing has moved, one of the weights is wrong, and the value keeps
the reference's scale, so that this shows.

Dims: N outputs, K inputs of a linear, C channels of a value, G key/value heads.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ..quant.folds import Fold, Rows, find_folds
from .linears import QuantizedLinear, float_structure, quantized_linears, read_back
from .points import Point

__all__ = ["WeightOf", "moved_channels"]

Array = NDArray[Any]
WeightOf = Callable[[str], Array | None]  # of the reference, by module: float32 [N, K] or, of a norm, [K]
_NOISE = 5.0  # standard errors of a factor that is told from rounded weights
_LEAST = 1e-3  # a factor nearer to 1 is none
_AGREES = 0.05  # how far a writer's factor and its readers' may be apart, besides their noise


def moved_channels(model: ModelProto, folder: Path, points: Sequence[Point], weight_of: WeightOf) -> dict[str, Array]:
    """By value of the graph: what the reference's is multiplied by to have its scale, broadcast along its last axes.

    `model` without its external data, which are in `folder`. Values that keep their scale are not in it.
    """
    folds = find_folds(float_structure(model))
    stored = _Stored(model.graph, folder, folds)
    values = {(point.module, point.side): point.value for point in points}
    written: dict[str, Array] = {}
    read: dict[str, Array] = {}
    # Norms first: their factors are exact, and stand in the columns of the linears that write other values.
    for fold in sorted(folds, key=lambda fold: stored.is_linear(fold.writers[0].parameter)):
        attentions = [_attention(model.graph, values.get((_module(reader), "in"), "")) for reader in fold.readers]
        cached = next((node for node in attentions if node is not None), None)
        factors_C = None if cached is None else _noted(model, cached)
        if factors_C is None:
            factors_C = _factors(fold, stored, weight_of)
        if factors_C is None:
            continue
        for rows in fold.writers:
            value = values.get((_module(rows.parameter), "out"))
            weight = weight_of(_module(rows.parameter))
            if value is not None and weight is not None and rows.parameter.endswith(".weight"):
                scale_N = written.setdefault(value, np.ones(len(weight), np.float32))
                scale_N[rows.start : rows.start + len(factors_C)] *= factors_C
        for reader in fold.readers:
            stored.columns[reader] = 1 / factors_C[fold.channels]
            value = values.get((_module(reader), "in"))
            if value is not None:
                read[value] = factors_C[fold.channels]
        if cached is not None:
            heads = next(attribute.i for attribute in cached.attribute if attribute.name == "kv_num_heads")
            read[cached.output[2]] = factors_C.reshape(heads, 1, -1)  # [1, G, T, C / G]
    return {**read, **written}


class _Stored:
    """The weights of a graph by the names that they have in the float one, and what is known of their factors."""

    def __init__(self, graph: GraphProto, folder: Path, folds: Sequence[Fold]) -> None:
        self.columns: dict[str, Array] = {}  # factors [K] by parameter
        self._writers = [(rows, fold.num_channels) for fold in folds for rows in fold.writers]
        self._folder = folder
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._linears: dict[str, QuantizedLinear] = {linear.parameter: linear for linear in quantized_linears(graph)}

    def is_linear(self, parameter: str) -> bool:
        """False of a norm."""
        return parameter not in self._tensors or len(self._tensors[parameter].dims) > 1

    def plain_rows(self, parameter: str, num_rows: int) -> Array:
        """Which rows of a linear no fold divides, bool [N]: their columns tell of its inputs alone."""
        plain_N = np.ones(num_rows, bool)
        for rows, count in self._writers:
            if rows.parameter == parameter:
                plain_N[rows.start : rows.start + count] = False
        return plain_N

    def is_quantized(self, parameter: str) -> bool:
        return parameter in self._linears

    def array(self, parameter: str) -> Array | None:
        """Float32; None where it is stored in another way."""
        if parameter in self._linears:
            return read_back(self._linears[parameter], self._tensors, self._folder)
        tensor = self._tensors.get(parameter)
        if tensor is None:
            return None
        return onnx.numpy_helper.to_array(tensor, str(self._folder)).astype(np.float32)


def _factors(fold: Fold, stored: _Stored, weight_of: WeightOf) -> Array | None:
    """What the reference's value is multiplied by, float32 [C]; None where nothing has moved, or it cannot be told.

    Float linears alone have no reason to take factors.
    """
    writer = fold.writers[0]
    if not any(map(stored.is_quantized, fold.readers)):
        return None
    told = _of_columns(fold, stored, weight_of)
    made = _of_rows(writer, fold.num_channels, stored, weight_of)
    if told is None or made is None:
        return None
    (s_C, s_noise_C), (f_C, f_noise_C) = told, made
    read_C, written_C = np.abs(s_C - 1) > s_noise_C, np.abs(f_C - 1) > f_noise_C
    is_exact = not stored.is_quantized(writer.parameter)
    if not written_C.any() or not (is_exact or read_C.any()):
        return None
    noise_C = s_noise_C * np.abs(f_C) + f_noise_C * np.abs(s_C)
    agrees_C = np.abs(f_C * s_C - 1) <= _AGREES + noise_C
    inverse_C = 1 / np.where(s_C > 0, s_C, 1)
    both_C = agrees_C | (read_C & written_C)  # where they disagree it is the writer that is taken to be wrong
    return np.where(both_C, np.where(agrees_C & is_exact, f_C, inverse_C), 1.0).astype(np.float32)


def _of_columns(fold: Fold, stored: _Stored, weight_of: WeightOf) -> tuple[Array, Array] | None:
    """Factors [C] of the readers' columns by least squares, and how far they may err."""
    pairs = [(name, stored.array(name), weight_of(_module(name))) for name in fold.readers]
    known = [(name, a, b) for name, a, b in pairs if a is not None and b is not None and a.shape == b.shape]
    if len(known) != len(pairs):
        return None
    plain = [stored.plain_rows(name, len(found)) for name, found, _ in known]
    if not any(plain_N.any() for plain_N in plain):
        plain = [~plain_N for plain_N in plain]
    sums = np.zeros((3, fold.num_channels))
    for (_, found, reference), plain_N in zip(known, plain, strict=True):
        _add(sums, reference[plain_N].T, found[plain_N].T, fold.channels)
    num_rows = sum(int(plain_N.sum()) for plain_N in plain)
    return _least_squares(sums, num_rows * len(fold.channels) // fold.num_channels)


def _of_rows(rows: Rows, num_channels: int, stored: _Stored, weight_of: WeightOf) -> tuple[Array, Array] | None:
    """The same of a writer's rows; of a norm, whose weight is a vector, the factors are exact."""
    found, reference = stored.array(rows.parameter), weight_of(_module(rows.parameter))
    if found is None or reference is None or found.shape != reference.shape:
        return None
    part = slice(rows.start, rows.start + num_channels)
    found, reference = found[part], reference[part]
    if found.ndim == 1:
        ratio_C = np.divide(found, reference, out=np.ones(len(found), np.float64), where=reference != 0)
        return ratio_C, np.full(len(found), 1e-6)
    sums = np.zeros((3, num_channels))
    _add(sums, reference * stored.columns.get(rows.parameter, 1.0), found, np.arange(num_channels))
    return _least_squares(sums, found.shape[1])


def _add(sums_3C: Array, reference_KN: Array, found_KN: Array, channels_K: Array) -> None:
    """Adds <found, reference>, <reference, reference> and <found, found> of each channel."""
    a_KN, b_KN = reference_KN.astype(np.float64), found_KN.astype(np.float64)
    for row, product in enumerate((b_KN * a_KN, a_KN * a_KN, b_KN * b_KN)):
        np.add.at(sums_3C[row], channels_K, product.sum(axis=1))


def _least_squares(sums_3C: Array, count: int) -> tuple[Array, Array]:
    """Slopes [C] of `count` points each, and _NOISE standard errors of them."""
    both_C, reference_C, found_C = sums_3C
    size_C = np.where(reference_C > 0, reference_C, 1)
    slope_C = np.where(reference_C > 0, both_C / size_C, 1.0)
    left_C = np.maximum(found_C - slope_C * both_C, 0)
    return slope_C, np.maximum(_NOISE * np.sqrt(left_C / max(count - 1, 1) / size_C), _LEAST)


def _attention(graph: GraphProto, value: str) -> NodeProto | None:
    """The attention that makes `value`, where it has a cache."""
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get(value)
    while node is not None and node.op_type in ("Reshape", "Cast", "Identity"):
        node = producers.get(node.input[0])
    return node if node is not None and node.op_type == "GroupQueryAttention" and len(node.output) > 2 else None


def _noted(model: ModelProto, attention: NodeProto) -> Array | None:
    """What its cached values are multiplied by, float32 [C], where the graph says so (quant.kv_cache)."""
    key = f"{attention.input[4]}.factors"
    noted = next((entry.value for entry in model.metadata_props if entry.key == key), None)
    return None if noted is None else 1 / np.frombuffer(base64.b64decode(noted), np.float32)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
