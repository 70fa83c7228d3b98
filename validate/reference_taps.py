"""What goes into the reference's modules and what comes out of them, kept on disk while it runs.

Modules are known by the parameters of the family's own graphs: a module of the graph and a module of the reference are
one where their weight is the same tensor of the checkpoint. Arrays are float32, [rows, columns] by flattening all axes
but the last; a module that is called several times (an image at a time, say) has its rows one call after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from ..export.family import RoleSpec, RowBlocks
from ..runtime.image import Patches

__all__ = ["TapStore", "TappedModule", "TappedReference", "record_taps", "round_to_bfloat16", "tapped_modules"]

Array = NDArray[Any]


class TappedReference(Protocol):
    """A reference whose modules can be looked into."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Modules by role, in the family's own form; or one by "", whose modules have the names of their tensors."""
        ...

    def row_order(self, role: str, patches: Sequence[Patches]) -> Array | None:
        """Places of our groups of rows among those of the role's modules; None where they are in our order."""
        ...


@dataclass(frozen=True)
class TappedModule:
    """A module of a role's graph, and the reference's module that has the same weight."""

    role: str
    path: str  # in the role's own modules, as in names of the graph's initializers
    module: nn.Module
    rows: RowBlocks | None  # those outputs of it, where the reference fuses several into one

    def weight(self) -> Array:
        """Float32: [K] of a norm, [N, K] of a linear, filters flattened."""
        weight = self.module.get_parameter("weight").detach().float().numpy()
        if weight.ndim == 1:
            return weight
        weight = weight.reshape(len(weight), -1)
        return weight if self.rows is None else _columns(weight.T, self.rows).T


@dataclass
class TapStore:
    """Arrays of one run by (role, path, side), as .npy files of a folder that is the caller's to remove.

    `order`: by role, where the reference has groups of rows in an order of its own, its places of ours.
    """

    folder: Path
    order: Mapping[str, Array] = field(default_factory=dict[str, Array])
    files: dict[tuple[str, str, str], list[Path]] = field(default_factory=dict[tuple[str, str, str], list[Path]])

    def add(self, key: tuple[str, str, str], rows: Array) -> None:
        calls = self.files.setdefault(key, [])
        self.folder.mkdir(parents=True, exist_ok=True)
        calls.append(self.folder / f"{len(self.files)}-{len(calls)}.npy")
        np.save(calls[-1], rows)

    def rows(self, key: tuple[str, str, str]) -> Array:
        """Float32 [rows, columns]. One call is mapped from its file, several are put together in memory."""
        calls: list[Array] = [np.load(file, mmap_mode="r") for file in self.files[key]]
        rows = calls[0] if len(calls) == 1 else np.concatenate(calls)
        order = self.order.get(key[0])
        return rows if order is None else rows.reshape(len(order), -1)[order].reshape(rows.shape)

    def __contains__(self, key: object) -> bool:
        """False too where a module was called with rows of several widths, which are no rows of one value."""
        calls = self.files.get(key, []) if isinstance(key, tuple) else []
        return len({np.load(file, mmap_mode="r").shape[1] for file in calls}) == 1


def tapped_modules(reference: TappedReference, roles: Mapping[str, RoleSpec]) -> tuple[TappedModule, ...]:
    """Every module of the roles that owns a weight and that the reference has too."""
    found: list[TappedModule] = []
    for role, spec in roles.items():
        with torch.device("meta"):  # allocates nothing
            own = spec.build()
        for path, module in own.named_modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is None:
                continue
            tensor = spec.tensor(f"{path}.weight" if path else "weight", tuple(weight.shape))
            theirs = _module(reference.modules(), role, path, tensor.name)
            if theirs is None:
                continue
            fused = len(theirs.get_parameter("weight")) != len(weight)
            found.append(TappedModule(role, path, theirs, tensor.rows if fused else None))
    return tuple(found)


@contextmanager
def record_taps(modules: Iterable[TappedModule], store: TapStore) -> Iterator[None]:
    """While it is open, every call of a module leaves what it took and what it gave in `store`."""
    hooks = [tapped.module.register_forward_hook(_hook(tapped, store)) for tapped in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def round_to_bfloat16(reference: TappedReference) -> None:
    """From now on the reference computes in bfloat16. Tables that are no parameters (rotary angles) stay."""
    for module in reference.modules().values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)


def _module(roots: Mapping[str, nn.Module], role: str, path: str, weight: str) -> nn.Module | None:
    """The module that computes what `path` of a role does; None where the reference has no module for it."""
    if role in roots:
        return roots[role].get_submodule(path)
    root = roots[""]
    found = dict(root.named_modules()).get(weight.removesuffix(".weight"))
    if role == "decoder" and isinstance(found, nn.Embedding):  # a head tied to the table
        found = root.get_output_embeddings() if isinstance(root, PreTrainedModel) else None
    return found


def _hook(tapped: TappedModule, store: TapStore) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        taken = _rows(module, inputs[0]) if inputs and isinstance(inputs[0], torch.Tensor) else None
        given = _rows(module, output)
        if taken is not None:
            store.add((tapped.role, tapped.path, "in"), taken)
        if given is not None:
            store.add((tapped.role, tapped.path, "out"), given if tapped.rows is None else _columns(given, tapped.rows))

    return keep


def _rows(module: nn.Module, tensor: Any) -> Array | None:
    """Float32 [rows, columns]; None for ids, and for a convolution that is more than a linear map of patches."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        patches = tensor.dim() == len(module.kernel_size) + 2 and (
            tuple(tensor.shape[2:]) == tuple(module.kernel_size) or all(size == 1 for size in tensor.shape[2:])
        )
        if not patches and tensor.shape[1] != module.out_channels:
            return None
        tensor = tensor.flatten(1) if patches else tensor.movedim(1, -1)
    return np.ascontiguousarray(tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy())


def _columns(rows: Array, blocks: RowBlocks) -> Array:
    """The outputs that belong to some rows of a fused weight."""
    starts = range(blocks.start, rows.shape[-1], blocks.stride)
    return np.concatenate([rows[:, start : start + blocks.size] for start in starts], axis=-1)
