"""Blocks that a model repeats are traced once: tracing costs seconds a block, and all but the first are its copies.

The first block of a kind is traced between two markers; each later one becomes a single node RepeatBlock that names the
kind and takes what the block takes: inputs, then parameters. export/repeat.py puts copies of the first in their places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .semantic import Size, emit_many, is_tracing

__all__ = ["ENTER", "KIND", "LEAVE", "REPEAT", "BlockRunner"]

ENTER, LEAVE, REPEAT = "EnterBlock", "LeaveBlock", "RepeatBlock"
KIND = "kind"  # attribute of all three: the number of the first block of this kind


@dataclass(frozen=True)
class _Kind:
    """What makes two calls alike, and what such a call gives."""

    signature: object
    shapes: list[Sequence[Size]]
    dtypes: list[torch.dtype]
    layout: pytree.TreeSpec


class BlockRunner:
    """Calls the blocks of one forward pass: `runner(block, *inputs)` gives what `block(*inputs)` gives.

    Inputs and results are tensors or tuples of them. Blocks are alike where all their modules agree in class, plain
    attributes and sizes, and their inputs in fixed sizes and dtype.
    """

    def __init__(self) -> None:
        self._kinds: list[_Kind] = []

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        if not is_tracing():
            return block(*inputs)
        tensors, layout = pytree.tree_flatten(inputs)
        signature = (_signature(block), [(_sizes(tensor), tensor.dtype) for tensor in tensors])
        everything = [*tensors, *block.parameters()]
        for number, kind in enumerate(self._kinds):
            if kind.signature == signature:
                results = _emit(REPEAT, everything, kind.shapes, kind.dtypes, number)
                return pytree.tree_unflatten(results, kind.layout)
        number = len(self._kinds)
        entered = _emit(ENTER, everything, *_described(tensors), number)
        results, result_layout = pytree.tree_flatten(block(*pytree.tree_unflatten(entered, layout)))
        shapes, dtypes = _described(results)
        self._kinds.append(_Kind(signature, shapes, dtypes, result_layout))
        return pytree.tree_unflatten(_emit(LEAVE, results, shapes, dtypes, number), result_layout)


def _sizes(tensor: torch.Tensor) -> tuple[int | None, ...]:
    """Fixed sizes, and None for a dynamic one: each tensor of a cache has a symbol of its own for the same length."""
    return tuple(size if isinstance(size, int) else None for size in tensor.shape)


def _described(tensors: list[torch.Tensor]) -> tuple[list[Sequence[Size]], list[torch.dtype]]:
    return [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]


def _emit(
    operator: str, inputs: list[torch.Tensor], shapes: list[Sequence[Size]], dtypes: list[torch.dtype], number: int
) -> list[torch.Tensor]:
    return list(emit_many(operator, inputs, shapes=shapes, dtypes=dtypes, attributes={KIND: number}))


def _signature(module: nn.Module) -> object:
    """Equal for modules that trace alike; a module that holds tensors other than parameters is like no other."""
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    if any(isinstance(value, torch.Tensor) for value in plain.values()) or any(True for _ in module.buffers()):
        return object()
    sizes = [(name, tuple(values.shape), values.dtype) for name, values in module.named_parameters(recurse=False)]
    children = [(name, _signature(child)) for name, child in module.named_children()]
    return type(module), plain, sizes, children
