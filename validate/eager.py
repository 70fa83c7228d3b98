"""A reference for families that transformers does not have: the family's own modules in eager PyTorch, float32.

What ties these modules to upstream is the family's golden cases, or its tests where it has none; what this ties to them
is a package: the graphs as traced, lowered, stored and run.

Dims: S prompt tokens, P patches, C vision width, R visual rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..export.checkpoint import Checkpoint, CheckpointSource, resolve
from ..export.family import FamilySpec, RoleSpec, roles_of
from ..runtime.errors import CheckpointError
from ..runtime.image import Patches
from ..runtime.manifest import VisionSpec
from ..runtime.prepare import Prepared
from ..runtime.routing import routing_inputs
from ..runtime.vision_inputs import vision_inputs

__all__ = ["EagerReference", "eager_modules"]

Array = NDArray[Any]
_CHUNK_BYTES = 64 << 20  # float32 bytes that are read at once; a system reads no more than 2 GiB in a call


def eager_modules(checkpoint: Checkpoint, family: FamilySpec) -> dict[str, torch.nn.Module]:
    """The modules of each role with the checkpoint's weights, float32. Raises CheckpointError as an export does."""
    config = family.completed(checkpoint.config, checkpoint.documents)
    roles = family.roles(config)
    modules = {name: role.build().eval() for name, role in roles.items()}
    parameters = {
        f"{name}/{parameter}": values
        for name, module in modules.items()
        for parameter, values in module.named_parameters()
    }
    shapes = {key: tuple(values.shape) for key, values in parameters.items()}
    wanted = {
        f"{name}/{parameter}": role.tensor(parameter, shapes[f"{name}/{parameter}"])
        for name, role in roles.items()
        for parameter, _ in modules[name].named_parameters()
    }
    stored = resolve(checkpoint, wanted, family.normalise, lambda name: family.unused(config, name))
    source = CheckpointSource(stored, shapes)
    for key, values in parameters.items():
        step = max(1, _CHUNK_BYTES * len(values) // max(1, 4 * values.numel()))
        for start in range(0, len(values), step):
            stop = min(start + step, len(values))
            values.data[start:stop].copy_(torch.from_numpy(source.rows(key, start, stop)))
    return modules


class EagerReference:
    """A ReferenceModel of any family with a decoder."""

    origin = "the family's own modules in PyTorch"
    video_rule: str | None = None

    def __init__(self, checkpoint: Checkpoint, family: FamilySpec) -> None:
        """Raises CheckpointError for what does not fit, or where the family generates no text."""
        self._roles: Mapping[str, RoleSpec] = roles_of(family, checkpoint.config, checkpoint.documents)
        if "decoder" not in self._roles:
            raise CheckpointError(f"{checkpoint.path}: family {family.name} has no decoder, so there are no answers")
        self._vision = family.manifest(checkpoint.config, checkpoint.documents).vision
        self._modules = eager_modules(checkpoint, family)
        self._cache: list[torch.Tensor] = []
        self._rope_delta = 0

    def modules(self) -> dict[str, torch.nn.Module]:
        """By role: they are the family's own."""
        return dict(self._modules)

    def cache(self) -> list[tuple[Array, Array]]:
        """Keys and values of each layer so far, float32 [1, K, T, H]."""
        arrays = [tensor.float().numpy() for tensor in self._cache]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def row_order(self, role: str, patches: Sequence[Patches]) -> None:
        """None: rows are in the order of the patches everywhere."""
        del role, patches

    def pixels(self, images: Sequence[Image.Image]) -> None:
        """None: upstream's image processor is not here, so there are no pixels to compare with."""
        del images

    @torch.inference_mode()
    def vision(self, patches: Sequence[Patches]) -> tuple[Array | None, Array]:
        """Encoder output [P, C], and the rows that replace placeholders [R, D], of all visuals in one call."""
        pixels = torch.from_numpy(np.concatenate([item.pixel_values for item in patches]))
        grids = [item.grid for item in patches]
        if "patch_embed" in self._modules:
            return None, self._run("patch_embed", {"pixel_values": pixels}, grids).numpy()
        hidden = self._run("vision_encoder", {"pixel_values": pixels}, grids)
        if "projector" not in self._modules:
            return hidden.numpy(), hidden.numpy()
        return hidden.numpy(), self._run("projector", {"vision_features": hidden}, grids).numpy()

    @torch.inference_mode()
    def prefill(self, prepared: Prepared) -> tuple[Array, Array, None]:
        """Starts a prompt: logits of the tokens that the decoder sees, inputs_embeds [S, D]. Positions are as given."""
        ids = torch.from_numpy(np.asarray(prepared.table_ids, np.int64))[None]
        embeds = self._modules["embed_tokens"](ids)[0].numpy().copy()
        if prepared.visuals:
            rows = iter(self.vision(prepared.visuals)[1])
            for run in prepared.runs:
                for place in range(run.start, run.start + run.length):
                    embeds[place] = next(rows)
        ports = [port for port in self._roles["decoder"].inputs if port.name.startswith("past_key_values.")]
        dtype = next(self._modules["decoder"].parameters()).dtype
        self._cache = [torch.zeros(1, int(port.shape[1]), 0, int(port.shape[3]), dtype=dtype) for port in ports]
        self._rope_delta = prepared.rope_delta
        visual = prepared.seen(prepared.visual_tokens)
        logits = self._decode(prepared.seen(embeds), prepared.seen_positions, visual)
        return logits, embeds, None

    @torch.inference_mode()
    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        embeds = self._modules["embed_tokens"](torch.tensor([[token_id]]))[0].numpy()
        axes = self._roles["decoder"].inputs[2].shape[:-2]
        place = self._cache[0].shape[2] + self._rope_delta
        return self._decode(embeds, np.full((*map(int, axes), 1), place, np.int64), np.zeros(1, bool))[-1]

    def _run(self, role: str, known: Mapping[str, torch.Tensor], grids: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """A role of the vision side; inputs that are not known are index inputs of the grids."""
        names = [port.name for port in self._roles[role].inputs]
        missing = [name for name in names if name not in known]
        spec = self._vision or VisionSpec(inputs=(), merge_size=1, window_blocks=0)
        indices = {name: torch.from_numpy(array) for name, array in vision_inputs(spec, grids, missing).items()}
        return self._modules[role](*({**known, **indices}[name] for name in names))

    def _decode(self, embeds_SD: Array, positions: Array, visual_S: Array) -> Array:
        """Adds rows to the cache; logits of all of them, float32 [S, V]. Which are visual matters to some decoders."""
        total = self._cache[0].shape[2] + len(embeds_SD)
        names = {port.name for port in self._roles["decoder"].inputs}
        routing = {name: array for name, array in routing_inputs(visual_S).items() if name in names}
        logits, *self._cache = self._modules["decoder"](
            torch.from_numpy(embeds_SD)[None],
            torch.ones(1, total, dtype=torch.int64),
            torch.from_numpy(np.ascontiguousarray(positions)).unsqueeze(-2),
            torch.tensor([0]),
            *(torch.from_numpy(routing[name]) for name in routing),
            self._cache,
        )
        return logits[0].numpy()
