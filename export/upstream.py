"""A checkpoint in the class of transformers that computes it: the reference of families that transformers has."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..runtime.errors import CheckpointError
from .bitsandbytes import compute_in_float32

__all__ = ["load_upstream"]


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
