"""Runs a role of a checkpoint block by block in PyTorch, the weights of one block in memory at a time.

The blocks of a role are the elements of its outermost ModuleLists. What the role's own forward does between them is
unknown here, and need not be known: to run block b for a sample, the forward is called again, in which block b - 1
gives what it gave before and earlier blocks give tensors without values, and it ends when block b is done. Anything
that needed more than the block just before would stop with an error of PyTorch, not go wrong.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from .layers import Embedding, Linear

__all__ = ["ReadRows", "RoleStages", "Stage"]

# (parameter, first row, last row + 1) -> float32 rows
ReadRows = Callable[[str, int, int], np.ndarray]
_CHUNK_BYTES = 64 << 20


class _Done(Exception):  # noqa: N818 - it ends a call, and is no error
    """Ends a forward that has done what it was called for."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


class RoleStages:
    """The stages of a role on some samples: what lies before the blocks, each block, what lies behind them."""

    def __init__(
        self,
        module: nn.Module,
        read: ReadRows,
        feeds: Mapping[int, Sequence[Any]],
        weights: Sequence[torch.Tensor],
        carried: MutableMapping[int, Any],
    ) -> None:
        """`module` is on the device "meta"; `feeds` are its arguments by sample, `weights` [T] those of its rows.

        `carried` is where what a stage gives waits for the next one, by sample.
        """
        self.feeds, self.weights = feeds, weights
        self._module, self._read = module, read
        self._blocks = list(_blocks(module, ""))
        self._place = -1  # of the block that is run now; -1 before all, their number behind all
        self._sample = 0
        self._carried = carried  # what the block before gave, by sample
        self._shapes: list[list[Any]] = [[] for _ in weights]  # what earlier blocks gave, without values
        for index, (_, block) in enumerate(self._blocks):
            block.forward = functools.partial(self._call_block, index, block.forward)
        inside = {id(part) for _, block in self._blocks for part in block.modules()}
        self._outside = {name: part for name, part in module.named_modules() if id(part) not in inside}
        for name, part in self._outside.items():
            if isinstance(part, Embedding):
                part.forward = functools.partial(self._look_up, _join(name, "weight"))
            elif isinstance(part, Linear):  # a head is large, and often not needed
                part.register_forward_pre_hook(functools.partial(self._load_late, name))
            else:
                self._load(name, part)

    @property
    def outside(self) -> set[str]:
        """Names of the weights of linears that belong to no block."""
        return {_join(name, "weight") for name, part in self._outside.items() if isinstance(part, Linear)}

    def num_stages(self, *, to_the_end: bool) -> int:
        """How many stages there are at most: one before the blocks, where linears are there, and one behind them."""
        return (len(self._blocks) + 1 if self._blocks else 0) + to_the_end

    def stages(self, *, to_the_end: bool) -> Iterator["Stage"]:
        """Each stage in turn, loaded; its samples go on when the next is asked for, by the weights it has then.

        What lies behind the last block comes only where the role is run `to_the_end`.
        """
        if self._blocks:
            self._place = -1
            self.run(0)  # loads what is needed
            if before := self._linears():
                yield Stage(self, self._outside_parameters(), before)
            done = set(before)
            for place, (name, block) in enumerate(self._blocks):
                self._place = place
                for part_name, part in block.named_modules():
                    self._load(_join(name, part_name), part)
                parameters = {_join(name, key): values for key, values in block.named_parameters()}
                linears: dict[str, nn.Module] = {
                    _join(name, key, "weight"): part for key, part in block.named_modules() if isinstance(part, Linear)
                }
                yield Stage(self, parameters, linears)
                self._advance()
                _unload(block)
            self._place = len(self._blocks)
        else:
            done = set[str]()
        if to_the_end:
            self.run(0)
            behind = {name: part for name, part in self._linears().items() if name not in done}
            yield Stage(self, self._outside_parameters(), behind)

    def run(self, sample: int) -> Any:
        """What the stage gives for a sample: all results of a block, or of the role behind the last one."""
        self._sample = sample
        try:
            return self._module(*self.feeds[sample])
        except _Done as done:
            return done.result

    def _advance(self) -> None:
        for sample in range(len(self.weights)):
            result = self.run(sample)
            self._shapes[sample].append(pytree.tree_map(lambda tensor: tensor.to("meta"), result))
            self._carried[sample] = result

    def _call_block(self, index: int, forward: Callable[..., Any], *inputs: Any) -> Any:
        if index < self._place:
            assert index < len(self._shapes[self._sample]), f"{self._blocks[index][0]}: is called out of turn"
            is_last = index == self._place - 1
            return self._carried[self._sample] if is_last else self._shapes[self._sample][index]
        raise _Done(inputs if self._place < 0 else forward(*inputs))  # before the blocks: what the first one is given

    def _linears(self) -> dict[str, nn.Module]:
        """Linears outside the blocks that were called so far."""
        return {
            _join(name, "weight"): part
            for name, part in self._outside.items()
            if isinstance(part, Linear) and part.weight.device.type != "meta"
        }

    def _outside_parameters(self) -> dict[str, nn.Parameter]:
        return {
            _join(name, key): values
            for name, part in self._outside.items()
            for key, values in part.named_parameters(recurse=False)
            if values.device.type != "meta"
        }

    def _load_late(self, name: str, part: nn.Module, inputs: Any) -> None:
        del inputs
        if next(part.parameters()).device.type == "meta":
            self._load(name, part)

    def _load(self, name: str, part: nn.Module) -> None:
        """Reads the parameters that a module holds itself."""
        for key, values in list(part.named_parameters(recurse=False)):
            loaded = torch.empty(values.shape)
            step = max(1, _CHUNK_BYTES * len(values) // max(1, 4 * values.numel()))
            for start in range(0, len(values), step):
                stop = min(start + step, len(values))
                loaded[start:stop] = torch.from_numpy(self._read(_join(name, key), start, stop))
            setattr(part, key, nn.Parameter(loaded, requires_grad=False))

    def _look_up(self, parameter: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a table, without the table."""
        unique, places = torch.unique(ids, return_inverse=True)
        rows = [torch.from_numpy(self._read(parameter, row, row + 1)) for row in unique.tolist()]
        return torch.cat(rows)[places]


class Stage:
    """A part of a role in memory; see quant/calibrate.py for what it is handed over for."""

    def __init__(self, role: RoleStages, parameters: dict[str, nn.Parameter], linears: dict[str, nn.Module]) -> None:
        self.parameters, self.linears = parameters, linears
        self.num_samples = len(role.weights)
        self._role = role

    def run(self, sample: int) -> torch.Tensor:
        """The first result of the stage for a sample."""
        return self.results(sample)[0]

    def results(self, sample: int) -> list[torch.Tensor]:
        """All of them: those of a decoder's layer are its output, keys and values [B, G, T, E]."""
        return pytree.tree_leaves(self._role.run(sample))

    def row_weights(self, sample: int, num_rows: int) -> torch.Tensor:
        """Those of the sample's rows [num_rows], where the stage has as many rows; else all count alike."""
        weights = self._role.weights[sample]
        return weights if len(weights) == num_rows else torch.ones(num_rows)


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Elements of the outermost ModuleLists, by name."""
    for name, child in module.named_children():
        path = _join(prefix, name)
        if isinstance(child, nn.ModuleList):
            yield from ((_join(path, key), block) for key, block in child.named_children())
        else:
            yield from _blocks(child, path)


def _unload(block: nn.Module) -> None:
    for part in block.modules():
        for key, values in list(part.named_parameters(recurse=False)):
            setattr(part, key, nn.Parameter(torch.empty(values.shape, device="meta"), requires_grad=False))


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
