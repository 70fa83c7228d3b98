"""The Python files that POINTS1.5 checkpoints bring along, as `validate --reference --trust-remote-code` needs them.

Follows the protocol ReferenceModel of validate/reference.py. Both layouts have `vision_encoder`, `vision_projector` and
`llm`; upstream's own chat() loads images from files, so its steps are called one by one. Upstream asks for its package
wepoints, a matching transformers and flash-attention; what is missing is told when the checkpoint is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from ...runtime.errors import CheckpointError
from ...runtime.image import Patches
from ...runtime.prepare import Prepared
from ..upstream import UpstreamModel

__all__ = ["Reference", "load"]

Array = NDArray[Any]


def load(folder: Path) -> "Reference":
    """The checkpoint in float32 by its own code, which is run. Raises CheckpointError where that fails."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True
        )
    except Exception as error:  # other people's code may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{folder}: its own code does not load with transformers {transformers.__version__} ({reason}); "
            "install what it asks for, or leave out --trust-remote-code"
        ) from error
    return Reference(model.eval())


class Reference(UpstreamModel):
    """One checkpoint in PyTorch, float32; a prompt at a time."""

    origin = "the checkpoint's own Python files"

    def pixels(self, images: Sequence[Image.Image]) -> None:
        """None: the image processor is of the package wepoints, not of the checkpoint."""
        del images

    @torch.inference_mode()
    def vision(self, patches: Sequence[Patches]) -> tuple[Array, Array]:
        """Tower output [P, C], and the rows that replace placeholders [R, D], of all images in one call."""
        pixels = torch.from_numpy(np.concatenate([item.pixel_values for item in patches]))
        grids = torch.tensor([item.grid for item in patches], dtype=torch.int64)
        hidden = self._model.vision_encoder(pixels, grid_thw=grids)
        return hidden.float().numpy(), self._model.vision_projector(hidden).float().numpy()

    @torch.inference_mode()
    def prefill(self, prepared: Prepared) -> tuple[Array, Array, None]:
        """Starts a prompt: logits [S, V], inputs_embeds [S, D] after splicing. The decoder counts positions itself."""
        ids = torch.from_numpy(np.asarray(prepared.input_ids, np.int64))[None]
        embeds = self._model.llm.get_input_embeddings()(ids).clone()
        if prepared.visuals:
            rows = torch.from_numpy(self.vision(prepared.visuals)[1])
            places = [place for run in prepared.runs for place in range(run.start, run.start + run.length)]
            embeds[0, places] = rows.to(embeds.dtype)  # bfloat16 where the reference's own noise is measured
        return self._advance(inputs_embeds=embeds), embeds[0].float().numpy(), None

    @torch.inference_mode()
    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        return self._advance(input_ids=torch.tensor([[token_id]]), past_key_values=self._cache)[-1]

    def _advance(self, **inputs: Any) -> Array:
        output = self._model.llm(**inputs, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[0].float().numpy()
