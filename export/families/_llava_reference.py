"""The upstream class of LLaVA in PyTorch, as `validate --reference` needs it.

Follows the protocol ReferenceModel of validate/reference.py. Checkpoints of the first release, which transformers does
not read, go into the same class by their tensors' names. S prompt tokens, N patches, C vision width, R visual rows, D
embedding width, V vocabulary, F images.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ...runtime.image import Patches
from ...runtime.prepare import Prepared
from ..checkpoint import Checkpoint
from ..family import Json
from ..text_config import is_tied
from ..upstream import UpstreamModel, load_upstream
from .llava import CLIP_LARGE, image_size, is_first_form, known_tower, normalise, text_part

__all__ = ["Reference", "load"]

Array = NDArray[Any]


def load(folder: Path) -> "Reference":
    """The checkpoint in float32 with eager attention, from local files. Raises CheckpointError for missing tensors."""
    checkpoint = Checkpoint.open(folder)
    first = is_first_form(checkpoint.config)
    instead = {"config": _first_config(checkpoint.config), "state_dict": _first_tensors(checkpoint)} if first else {}
    model = load_upstream(LlavaForConditionalGeneration, folder, **instead)
    return Reference(model, _processor(checkpoint))


def _processor(checkpoint: Checkpoint) -> Any:
    """Its Pillow backend. Of the first release: LLaVA's, which pads to squares where config.json says so."""
    if not is_first_form(checkpoint.config):
        return AutoImageProcessor.from_pretrained(checkpoint.path, backend="pil", local_files_only=True)
    side = image_size(checkpoint.config)
    own = checkpoint.documents.get("preprocessor_config.json", {})
    pads = checkpoint.config.get("image_aspect_ratio") == "pad"
    known: dict[str, Any] = {
        name: value for name, value in own.items() if name.startswith(("image_m", "image_s", "rescale"))
    }
    square: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return LlavaImageProcessorPil(**known, **square, do_pad=pads)


def _first_config(config: Json) -> LlavaConfig:
    tower, text = known_tower(config), text_part(config)["text_config"]
    names = inspect.signature(LlamaConfig).parameters
    sizes: dict[str, Any] = {name: tower[name] for name in CLIP_LARGE}
    known: dict[str, Any] = {name: value for name, value in text.items() if name in names}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes),
        text_config=LlamaConfig(**known),
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if config.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=is_tied(config),
    )


def _first_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """By the names of transformers 5, which are those that the family uses."""
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    return {normalise(name): values for file in sorted(files) for name, values in load_file(file).items()}


class Reference(UpstreamModel):
    """One checkpoint in PyTorch, float32; a prompt at a time."""

    origin = "transformers"

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor
        self._cache: Any = None

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        """The processor's own pixels as patches [N, 3*p*p], and grids [F, 3]."""
        found = np.stack(self._processor(images=list(images), return_tensors="np")["pixel_values"])
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
        return seen["features"].flatten(0, 1).float().numpy(), torch.cat(tuple(rows)).float().numpy()

    @torch.inference_mode()
    def prefill(self, prepared: Prepared) -> tuple[Array, Array, Array]:
        """Starts a prompt: logits [S, V], inputs_embeds [S, D] after splicing, position_ids [S]."""
        embeds = self._model.get_input_embeddings()(torch.from_numpy(prepared.input_ids.clip(min=0))[None])
        if prepared.visuals:
            rows = self._model.get_image_features(self._pixels(prepared.visuals), return_dict=True).pooler_output
            for run, row in zip(prepared.runs, rows, strict=True):
                embeds[0, run.start : run.start + run.length] = row
        output = self._model(inputs_embeds=embeds, use_cache=True)
        self._cache = output.past_key_values
        positions = np.arange(len(prepared.input_ids))  # the decoder counts them itself
        return output.logits[0].float().numpy(), embeds[0].float().numpy(), positions

    @torch.inference_mode()
    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        output = self._model(input_ids=torch.tensor([[token_id]]), past_key_values=self._cache, use_cache=True)
        return output.logits[0, -1].float().numpy()

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
