"""The upstream class of LLaVA in PyTorch, as `validate --reference` needs it.

Follows the protocol ReferenceModel of validate/reference.py. Checkpoints of the first release, which transformers does
not read, are run by the family's own modules. S prompt tokens, N patches, C vision width, R visual rows, D embedding
width, V vocabulary, F images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from ...runtime.errors import CheckpointError
from ...runtime.image import Patches
from ...runtime.prepare import Prepared

__all__ = ["Reference", "load"]

Array = NDArray[Any]


def load(folder: Path) -> "Reference":
    """The checkpoint in float32 with eager attention, from local files. Raises CheckpointError for missing tensors."""
    shows_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the command has one of its own
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        if shows_bar:
            logging.enable_progress_bar()
    model, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise CheckpointError(f"{folder}: transformers cannot fill the model: {wrong}; download the checkpoint again")
    return Reference(model.eval(), folder)


class Reference:
    """One checkpoint in PyTorch, float32; a prompt at a time."""

    origin = "transformers"
    video_rule: str | None = None

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._cache: Any = None

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        """The processor's own pixels as patches [N, 3*p*p], and grids [F, 3], by its Pillow backend."""
        processor = AutoImageProcessor.from_pretrained(self._folder, backend="pil", local_files_only=True)
        found = np.stack(processor(images=list(images), return_tensors="np")["pixel_values"])
        size = self._model.config.vision_config.patch_size
        rows, columns = (length // size for length in found.shape[2:])
        blocks = found[:, :, : rows * size, : columns * size].reshape(-1, 3, rows, size, columns, size)
        patches = blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * size * size)
        return patches, np.tile(np.array([1, rows, columns]), (len(images), 1))

    @torch.inference_mode()
    def vision(self, patches: Sequence[Patches]) -> tuple[Array, Array]:
        """What goes into the projector [N, C], and what comes out [R, D], of all images in one call."""
        model = self._model.model
        seen: dict[str, torch.Tensor] = {}
        hook = model.multi_modal_projector.register_forward_pre_hook(
            lambda _module, arguments: seen.update(features=arguments[0])
        )
        try:
            rows = model.get_image_features(self._pixels(patches), return_dict=True).pooler_output
        finally:
            hook.remove()
        return seen["features"].flatten(0, 1).numpy(), torch.cat(tuple(rows)).numpy()

    @torch.inference_mode()
    def prefill(self, prepared: Prepared) -> tuple[Array, Array, Array]:
        """Starts a prompt: logits [S, V], inputs_embeds [S, D] after splicing, position_ids [S]."""
        feeds: dict[str, Any] = {"input_ids": torch.from_numpy(prepared.input_ids)[None]}
        if prepared.visuals:
            feeds["pixel_values"] = self._pixels(prepared.visuals)
        seen: dict[str, Any] = {}
        hook = self._model.model.language_model.register_forward_pre_hook(
            lambda _module, _arguments, named: seen.update(named), with_kwargs=True
        )
        try:
            output = self._model(**feeds, use_cache=True)
        finally:
            hook.remove()
        self._cache = output.past_key_values
        positions = np.arange(len(prepared.input_ids))  # the decoder counts them itself
        return output.logits[0].numpy(), seen["inputs_embeds"][0].numpy(), positions

    @torch.inference_mode()
    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        output = self._model(input_ids=torch.tensor([[token_id]]), past_key_values=self._cache, use_cache=True)
        return output.logits[0, -1].numpy()

    def _pixels(self, patches: Sequence[Patches]) -> torch.Tensor:
        """Patches as whole images again, float32 [F, 3, side, side]; what a convolution leaves out is 0."""
        config = self._model.config.vision_config
        size, side = config.patch_size, config.image_size
        images = np.zeros((len(patches), 3, side, side), np.float32)
        for image, item in zip(images, patches, strict=True):
            _, rows, columns = item.grid
            blocks = item.pixel_values.reshape(rows, columns, 3, size, size).transpose(2, 0, 3, 1, 4)
            image[:, : rows * size, : columns * size] = blocks.reshape(3, rows * size, columns * size)
        return torch.from_numpy(images)
