"""The upstream class of Qwen2-VL and Qwen2.5-VL in PyTorch, as `validate --reference` needs it.

Follows the protocol ReferenceModel of validate/reference.py. Everything that names a module of transformers for these
families stands here. S prompt tokens, P patches, C vision width, R visual rows, D embedding width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.vision_utils import get_vision_window_index

from ...runtime.errors import CheckpointError
from ...runtime.image import Patches
from ...runtime.prepare import Prepared
from ..upstream import UpstreamModel, load_upstream

__all__ = ["Reference", "load"]

Array = NDArray[Any]
_IMAGE, _VIDEO = 1, 2  # mm_token_type_ids
_PREPROCESSOR = "preprocessor_config.json"


def load(folder: Path) -> "Reference":
    """The checkpoint in float32 with eager attention, from local files.

    Raises CheckpointError for missing tensors or a missing preprocessor_config.json. Truncated files are the caller's
    to find: export.checkpoint.Checkpoint.open does.
    """
    if not (folder / _PREPROCESSOR).is_file():
        raise CheckpointError(f"{folder / _PREPROCESSOR}: missing; download the checkpoint again")
    return Reference(load_upstream(AutoModelForImageTextToText, folder), folder)


class Reference(UpstreamModel):
    """One checkpoint in PyTorch, float32; a prompt at a time."""

    origin = "transformers"
    video_rule = "transformers-5.23"  # what the installed transformers computes; a rule of runtime/positions.py

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__(model)
        self._folder = folder

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        """The processor's own pixel_values [P, patch_dim] and grids [n, 3] of still images, by its Pillow backend."""
        processor = AutoImageProcessor.from_pretrained(self._folder, backend="pil", local_files_only=True)
        found = processor(images=list(images), return_tensors="np")
        return found["pixel_values"], found["image_grid_thw"]

    @torch.inference_mode()
    def vision(self, patches: Sequence[Patches]) -> tuple[Array, Array]:
        """Blocks' output [P, C] in natural patch order, and merger output [R, D], of all visuals in one call."""
        pixel_values, grids = _pixels(patches)
        output = self._model.model.visual(pixel_values, grid_thw=grids)
        hidden = output.last_hidden_state
        order = self.row_order("projector", patches)
        if order is not None:
            hidden = hidden.reshape(len(order), -1, hidden.shape[-1])[torch.from_numpy(order)].reshape(hidden.shape)
        return hidden.float().numpy(), output.pooler_output.float().numpy()

    def row_order(self, role: str, patches: Sequence[Patches]) -> Array | None:
        """Places of the merge blocks in natural order: upstream's merger has them in window order, as its blocks do."""
        visual = self._model.model.visual
        if role != "projector" or not patches or "window_size" not in visual.config.to_dict():
            return None
        window_index, _ = get_vision_window_index(
            _pixels(patches)[1],
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        return torch.argsort(window_index).numpy()

    @torch.inference_mode()
    def prefill(self, prepared: Prepared) -> tuple[Array, Array, Array]:
        """Starts a prompt: logits [S, V], inputs_embeds [S, D] after splicing, position_ids [3, S]."""
        config = self._model.config
        ids = torch.from_numpy(prepared.input_ids)[None]
        types = torch.zeros_like(ids, dtype=torch.int32)
        types[ids == config.image_token_id] = _IMAGE
        types[ids == config.video_token_id] = _VIDEO
        feeds: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": types}
        if prepared.images:
            feeds["pixel_values"], feeds["image_grid_thw"] = _pixels(prepared.images)
        if prepared.videos:
            feeds["pixel_values_videos"], feeds["video_grid_thw"] = _pixels(prepared.videos)
            if "tokens_per_second" in config.vision_config.to_dict():  # else positions count frames
                feeds["second_per_grid_ts"] = torch.tensor([patches.seconds_per_grid for patches in prepared.videos])
        self._model.model.rope_deltas = None  # upstream would keep those of the prompt before
        seen: dict[str, Any] = {}
        hook = self._model.model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        try:
            output = self._model(**feeds, use_cache=True)
        finally:
            hook.remove()
        self._cache = output.past_key_values
        length = len(prepared.input_ids)
        positions = seen["position_ids"]  # None for text alone: counted by the model itself
        if positions is None:
            positions = torch.arange(length).expand(3, 1, length)
        return output.logits[0].float().numpy(), seen["inputs_embeds"][0].float().numpy(), positions[-3:, 0].numpy()

    @torch.inference_mode()
    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        output = self._model(input_ids=torch.tensor([[token_id]]), past_key_values=self._cache, use_cache=True)
        return output.logits[0, -1].float().numpy()


def _pixels(patches: Sequence[Patches]) -> tuple[torch.Tensor, torch.Tensor]:
    pixel_values = np.concatenate([patch.pixel_values for patch in patches])
    return torch.from_numpy(pixel_values), torch.tensor([patch.grid for patch in patches], dtype=torch.int64)
