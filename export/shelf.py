"""What flows between the stages of calibration, by sample: in memory up to a bound, beyond it in files."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..quant.data_file import disk_errors

__all__ = ["Shelf", "Space"]


@dataclass
class Space:
    """Bytes of memory that shelves share: once it is full, what is put on any of them goes to disk."""

    left: int


class Shelf(MutableMapping[int, Any]):
    """Trees of tensors by the number of a sample. A file is read as a whole each time: memory holds one sample's.

    Raises CapacityError naming the file where the disk is full.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        """Files go below `folder`, which is made if it is missing; they are gone when what they hold is."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._space = folder, space
        self._held: dict[int, Any] = {}
        self._filed: dict[int, tuple[list[Any], pytree.TreeSpec]] = {}  # leaves, shapes in place of tensors

    def __setitem__(self, sample: int, value: Any) -> None:
        if sample in self:
            del self[sample]
        size = _num_bytes(value)
        if size <= self._space.left:
            self._space.left -= size
            self._held[sample] = pytree.tree_map(_own, value)
            return
        leaves, spec = pytree.tree_flatten(value)
        path = self._file(sample)
        with disk_errors(path, size), path.open("wb") as file:
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor) and leaf.numel():
                    file.write(leaf.contiguous().numpy().data)
        shapes = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._filed[sample] = shapes, spec

    def __getitem__(self, sample: int) -> Any:
        if sample in self._held:
            return self._held[sample]
        leaves, spec = self._filed[sample]
        with self._file(sample).open("rb") as file:
            found = [_read(file, leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(found, spec)

    def __delitem__(self, sample: int) -> None:
        if sample in self._held:
            self._space.left += _num_bytes(self._held.pop(sample))
            return
        del self._filed[sample]
        self._file(sample).unlink()

    def __iter__(self) -> Iterator[int]:
        yield from (*self._held, *self._filed)

    def __len__(self) -> int:
        return len(self._held) + len(self._filed)

    def _file(self, sample: int) -> Path:
        return self._folder / str(sample)


def _read(file: BufferedReader, shape: torch.Tensor) -> torch.Tensor:
    tensor = torch.empty(shape.shape, dtype=shape.dtype)
    if tensor.numel():
        num_bytes = file.readinto(tensor.numpy().data)
        assert num_bytes == tensor.nbytes
    return tensor


def _num_bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _own(leaf: Any) -> Any:
    """A part of a larger tensor would keep all of it in memory."""
    is_part = isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() > leaf.nbytes
    return leaf.clone() if is_part else leaf
