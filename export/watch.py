"""Watches how large values get in the modules of a role, while calibration runs samples through them."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..quant.ranges import Ranges
from .family import Port

__all__ = ["Watch"]


class Watch:
    """Fills `ranges` while `is_on`, from every call of every module that has parameters of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.ranges = Ranges()
        self.is_on = False
        for name, part in module.named_modules():
            if any(True for _ in part.named_parameters(recurse=False)):
                part.register_forward_hook(functools.partial(self._see, name))

    def see_inputs(self, ports: Sequence[Port], feed: Sequence[Any]) -> None:
        """Arguments of the role's forward; a cache is what the role wrote itself."""
        for port, value in zip(ports, feed, strict=False):
            if isinstance(value, torch.Tensor):
                _raise(self.ranges.inputs, port.name, value)

    def _see(self, name: str, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self.is_on:
            return
        for key, values in part.named_parameters(recurse=False):
            parameter = f"{name}.{key}" if name else key
            if parameter not in self.ranges.parameters and values.device.type != "meta":
                _raise(self.ranges.parameters, parameter, values)
        weight = f"{name}.weight" if name else "weight"
        _raise(self.ranges.reads, weight, inputs[0])
        for tensor in pytree.tree_leaves(output):
            _raise(self.ranges.writes, weight, tensor)


def _raise(sizes: dict[str, float], name: str, values: Any) -> None:
    """Keeps the largest absolute value by name; NaN counts as infinite."""
    if not isinstance(values, torch.Tensor) or not values.is_floating_point() or not values.numel():
        return
    low, high = values.aminmax()
    largest = float(torch.maximum(-low, high).nan_to_num(torch.inf))
    sizes[name] = max(sizes.get(name, 0.0), largest)
