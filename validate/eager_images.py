"""The reference of packages without a decoder: the family's own modules in eager PyTorch, float32, one image a call."""

from collections.abc import Sequence

import numpy as np
import torch

from ..export.checkpoint import Checkpoint
from ..export.family import FamilySpec, roles_of
from ..runtime.errors import CheckpointError
from ..runtime.image import Patches
from ..runtime.token_drop import kept_inputs
from ..runtime.vision_inputs import vision_inputs
from .eager import eager_modules
from .image_stages import ImageStages

__all__ = ["EagerImages"]


class EagerImages:
    """An ImageReference of any family that pools its images."""

    origin = "the family's own modules in PyTorch, tied to upstream by golden cases"

    def __init__(self, checkpoint: Checkpoint, family: FamilySpec) -> None:
        """Raises CheckpointError for what does not fit, or where the family makes no vectors of images."""
        self._roles = roles_of(family, checkpoint.config, checkpoint.documents)
        vision = family.manifest(checkpoint.config, checkpoint.documents).vision
        if "decoder" in self._roles or "projector" not in self._roles or vision is None:
            raise CheckpointError(f"{checkpoint.path}: family {family.name} makes no vectors of images by themselves")
        self._vision = vision
        self._modules = eager_modules(checkpoint, family)

    def modules(self) -> dict[str, torch.nn.Module]:
        """By role: they are the family's own."""
        return dict(self._modules)

    def row_order(self, role: str, patches: Sequence[Patches]) -> None:
        """None: rows are in the order of the patches everywhere."""
        del role, patches

    @torch.inference_mode()
    def encode(self, patches: Patches) -> ImageStages:
        """One image by itself: features [N, D], vector [1, D], class scores [1, C]."""
        known = {"pixel_values": torch.from_numpy(patches.pixel_values)}
        known["vision_features"] = self._run("vision_encoder", patches, known)
        known["image_features"] = self._run("projector", patches, known)
        logits = self._run("classifier", patches, known).numpy() if "classifier" in self._modules else None
        return ImageStages(known["vision_features"].numpy(), known["image_features"].numpy(), logits)

    def _run(self, role: str, patches: Patches, known: dict[str, torch.Tensor]) -> torch.Tensor:
        """A role; inputs that are not known are index inputs."""
        names = [port.name for port in self._roles[role].inputs]
        asked = [name for name in names if name not in known]
        indices = kept_inputs(vision_inputs(self._vision, [patches.grid], asked), [patches.grid], [patches.kept])
        feeds = known | {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in indices.items()}
        return self._modules[role](*(feeds[name] for name in names))
