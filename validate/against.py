"""Another package, or another variant of the same one, as the reference: no PyTorch, no checkpoint.

It prepares its prompts by its own manifest, so that two packages which read a picture differently are told apart by
their inputs already. S prompt tokens, P patches, C vision width, R visual rows, D embedding width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.cache import Cache
from ..runtime.image import Patches
from ..runtime.model import Model
from ..runtime.package import MANIFEST_NAME, Package
from ..runtime.prepare import Prepared
from .image_stages import ImageStages, run_images

__all__ = ["PackageImages", "PackageReference", "open_other"]

Array = NDArray[Any]


def open_other(text: str) -> tuple[Package, str]:
    """PACKAGE or PACKAGE:VARIANT (default: its first) as the package and the name of the variant.

    Raises PackageError for a folder that is no package, and for a variant that it has not.
    """
    folder, colon, name = text.rpartition(":")
    if colon and not Path(text, MANIFEST_NAME).is_file():
        package = Package.open(folder)
        return package, package.variant(name).name
    package = Package.open(text)
    return package, package.variant().name


class PackageReference:
    """An AnsweringReference: a variant of a package, a prompt at a time."""

    origin = "the runtime of vlmport"
    video_rule: str | None = None

    def __init__(self, model: Model, num_new_tokens: int) -> None:
        """num_new_tokens: the most that are put through the cache behind a prompt."""
        assert "decoder" in model.manifest.roles
        self.model = model
        self._num_new_tokens = num_new_tokens
        self._cache: Cache | None = None
        self._rope_delta = 0

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        """Its own patches of stills [P, patch_dim], and grids [n, 3]."""
        content = [{"type": "image", "image": image} for image in images]
        visuals = self.model.prepare([{"role": "user", "content": content}]).visuals
        grids = np.array([item.grid for item in visuals], np.int64)
        return np.concatenate([item.pixel_values for item in visuals]), grids

    def vision(self, patches: Sequence[Patches]) -> tuple[Array | None, Array]:
        """Vision encoder [P, C] (None: there is none), rows that replace placeholders [R, D]."""
        seen = self.model.encode_vision(patches)
        return seen.vision, seen.features

    def prefill(self, prepared: Prepared) -> tuple[Array, Array, Array]:
        """Starts a prompt: logits [S, V] of the tokens that the decoder sees, inputs_embeds [S, D], position_ids."""
        visual = self.model.features(prepared)
        embeds = self.model.embed(prepared, None if visual is None else visual.features)
        self._cache = self.model.new_cache(len(embeds) + self._num_new_tokens)
        self._rope_delta = prepared.rope_delta
        logits = self.model.prefill_prepared(prepared, embeds, self._cache, all_logits=True)
        return logits, embeds, prepared.position_ids

    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        assert self._cache is not None
        return self.model.step(token_id, self._cache, self._rope_delta)


class PackageImages:
    """The same for a package without a decoder."""

    origin = "the runtime of vlmport"

    def __init__(self, model: Model) -> None:
        self.model = model

    def encode(self, patches: Patches) -> ImageStages:
        """One image by itself."""
        return run_images(self.model, [patches])
