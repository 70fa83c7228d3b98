"""A checkpoint in the class of transformers that computes it, or in its own: what such references have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from transformers.utils import logging

from ..runtime.errors import CheckpointError
from ..runtime.image import Patches
from .bitsandbytes import compute_in_float32

__all__ = ["UpstreamModel", "load_upstream"]

Array = NDArray[Any]


class UpstreamModel:
    """A model in PyTorch and the cache of the prompt it is at; part of ReferenceModel (validate/reference.py)."""

    video_rule: str | None = None

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def modules(self) -> dict[str, torch.nn.Module]:
        """Upstream's model, whose modules have the names of their tensors."""
        return {"": self._model}

    def cache(self) -> list[tuple[Array, Array]]:
        """Keys and values of each layer so far, float32 [1, K, T, H]."""
        return [(layer.keys.float().numpy(), layer.values.float().numpy()) for layer in self._cache.layers]

    def row_order(self, role: str, patches: Sequence[Patches]) -> Array | None:
        """None: rows are in the order of the patches everywhere."""
        del role, patches


def load_upstream(kind: Any, folder: Path, **instead: Any) -> Any:
    """The model in float32 with eager attention, in evaluation mode, from local files alone.

    kind: a class with `from_pretrained`. instead: `config` and `state_dict`, for a folder that transformers cannot
    read itself. Raises CheckpointError where tensors are missing or have other shapes.
    """
    shows_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the command has one of its own
    try:
        model, info = kind.from_pretrained(
            None if instead else folder,
            **instead,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        if shows_bar:
            logging.enable_progress_bar()
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise CheckpointError(f"{folder}: transformers cannot fill the model: {wrong}; download the checkpoint again")
    compute_in_float32(model)
    return model.eval()
