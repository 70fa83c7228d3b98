"""Which weights of a package share a choice of bits, and the bytes that each choice takes.

A head that is tied to the table is one tensor of the checkpoint, stored once where both are stored alike.
"""

from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from ..quant.recipe import Recipe, Rule, Target, WeightFormat
from ..quant.rewrite import StoredTensor, is_linear, rewrite, weights_of
from ..quant.source import WeightSource

__all__ = ["Group", "Key", "StoredSizes", "group_weights", "shared_with_tables"]

Key = tuple[str, str]  # role, parameter
Group = tuple[Key, ...]  # each of its weights, in the order of the roles

_LONG_NAME, _LARGE = "vision_encoder_int4-mixed.onnx_data", 10**9  # a place as a graph tells it
_PAGE, _LINE, _INLINE = 4096, 64, 1024  # as quant/store.py lays tensors out


def group_weights(
    graphs: Mapping[str, ir.Model], sources: Mapping[str, WeightSource], *, by_input: bool
) -> list[Group]:
    """The weights of all roles; together are those of one tensor, and if `by_input` linears that read one value."""
    groups: dict[Hashable, list[Key]] = {}
    for role, model in graphs.items():
        for name, value in weights_of(model.graph).items():
            origin = sources[role].origin(name)
            inputs = [use.node.inputs[0] for use in value.uses() if is_linear(use.node)]
            shared = by_input and len(inputs) == 1 and origin not in groups
            groups.setdefault((role, id(inputs[0])) if shared else origin, []).append((role, name))
    return [tuple(group) for group in groups.values()]


def shared_with_tables(graphs: Mapping[str, ir.Model], groups: Sequence[Group]) -> frozenset[Key]:
    """Tables of embeddings, and the weights that share a choice with one."""
    weights = {role: weights_of(model.graph) for role, model in graphs.items()}
    tables = {
        (role, name)
        for role, values in weights.items()
        for name, value in values.items()
        if not any(is_linear(use.node) for use in value.uses())
    }
    return frozenset(key for group in groups if tables.intersection(group) for key in group)


class StoredSizes:
    """Bytes of the files of a package, by how its weights are stored: upper bounds, a few per cent at most too much."""

    def __init__(
        self,
        graphs: Mapping[str, ir.Model],
        sources: Mapping[str, WeightSource],
        target: Target,
        block_size: int,
    ) -> None:
        """How codes are found makes no difference."""
        choices = (4, 8, 16, 32) if target == "cpu" else (4, 8, 16)
        self._sources = sources
        self._tensors: dict[tuple[str, str, int], list[StoredTensor]] = {}
        self.fixed = 0  # of graphs and of all that has no choice
        for role, model in graphs.items():
            weights = weights_of(model.graph).keys()
            for bits in choices:
                format = WeightFormat(bits) if bits >= 16 else WeightFormat(bits, block_size)
                recipe = Recipe("sizes", (Rule("*/*.weight", format),))
                clone = model.clone()
                stored = rewrite(clone, role, recipe, target)
                for tensor in stored:
                    if tensor.parameter in weights:
                        self._tensors.setdefault((role, tensor.parameter, bits), []).append(tensor)
                if bits == choices[0]:
                    self.fixed += _graph_bytes(clone, stored)
                    self.fixed += sum(_padded(tensor.num_bytes) for tensor in stored if tensor.parameter not in weights)

    def of(self, group: Group, bits: int) -> int:
        """Bytes of the weights of a group with so many bits each."""
        distinct = {
            (self._sources[role].origin(name), tensor.piece, tensor.num_bytes)
            for role, name in group
            for tensor in self._tensors[role, name, bits]
        }
        return sum(_padded(num_bytes) for _, _, num_bytes in distinct)


def _graph_bytes(model: ir.Model, stored: Sequence[StoredTensor]) -> int:
    """Of the .onnx file, and of the constants that go to the data file. Fills the initializers with places."""
    sizes = {tensor.name: tensor.num_bytes for tensor in stored}
    data = 0
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            data += _padded(value.const_value.nbytes)
        else:
            assert value.dtype is not None
            assert isinstance(value.shape, ir.Shape)
            value.const_value = ir.ExternalTensor(
                _LONG_NAME, _LARGE, sizes[name], value.dtype, shape=value.shape, name=name
            )
    return data + len(ir.to_proto(model).SerializeToString())


def _padded(num_bytes: int) -> int:
    unit = _PAGE if num_bytes >= 16 * _PAGE else _LINE
    return num_bytes if num_bytes < _INLINE else -(-num_bytes // unit) * unit
