"""The variant's stages under the names that golden folders use.

A key is (stage, modality, index): modality None counts all visuals of the prompt in the order of their placeholders;
index picks one image or clip, None all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.image import Patches
from ..runtime.manifest import ImageSpec, VisionSpec
from ..runtime.model import Model
from ..runtime.prepare import Prepared
from ..runtime.vision_inputs import vision_inputs
from .stages import Stages

__all__ = ["Key", "candidate_stages", "visible_tokens"]

Array = NDArray[Any]
Key = tuple[str, str | None, int | None]


def candidate_stages(model: Model, prepared: Prepared, stages: Stages) -> dict[Key, Array]:
    """Everything that the variant and its runtime can show of one prompt."""
    found: dict[Key, Array] = {
        ("position_ids", None, None): prepared.position_ids,
        ("extra.rope_deltas", None, None): np.array([prepared.rope_delta]),
        ("extra.input_ids", None, None): prepared.input_ids,
        ("extra.attention_mask", None, None): visible_tokens(prepared).astype(np.uint8),
        ("inputs_embeds", None, None): stages.inputs_embeds,
        ("prefill_logits", None, None): stages.prefill_logits,
        ("prefill_logits_last", None, None): stages.prefill_logits[-1],
        ("step_logits", None, None): stages.step_logits,
    }
    for layer, (keys, values) in enumerate(zip(stages.past_keys, stages.past_values, strict=True)):
        found[f"past_key.{layer}", None, None] = keys
        found[f"past_value.{layer}", None, None] = values
    if stages.vision is None or stages.features is None:
        return found
    vision = _split(stages.vision, [len(patches.pixel_values) for patches in prepared.visuals])
    features = _split(stages.features, [run.length for run in prepared.runs])
    for modality in (None, "image", "video"):
        picked = [i for i, run in enumerate(prepared.runs) if modality in (None, run.kind)]
        if picked:
            shown = [prepared.visuals[i] for i in picked]
            rows = [vision[i] for i in picked], [features[i] for i in picked]
            found |= _visual_stages(model.manifest.vision, modality, shown, *rows)
            if model.manifest.image is not None and model.manifest.image.slices is not None:
                found |= _tile_stages(model.manifest.image, modality, shown)
    return found


def visible_tokens(prepared: Prepared) -> Array:
    """Which tokens of a prompt the decoder sees, bool [S]."""
    return np.ones(len(prepared.input_ids), bool) if prepared.visible is None else prepared.visible


def _tile_stages(spec: ImageSpec, modality: str | None, tiles: Sequence[Patches]) -> dict[Key, Array]:
    """Pixels of tiles as upstream lays them out: a strip [3, p, p * patches] a tile, one flat row all together."""
    size = spec.patch_size
    strips = [tile.pixel_values.reshape(-1, 3, size, size).transpose(1, 2, 0, 3).reshape(3, size, -1) for tile in tiles]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    bytes_ = [np.rint((strip * std + mean) / spec.rescale).astype(np.uint8) for strip in strips]
    found: dict[Key, Array] = {("tgt_sizes", modality, None): np.array([tile.grid[1:] for tile in tiles])}
    for stage, arrays in (("pixel_values", strips), ("pixels_u8", bytes_)):
        found[stage, modality, None] = np.concatenate([array.reshape(-1) for array in arrays])
        found |= {(stage, modality, index): array for index, array in enumerate(arrays)}
    return found


def _visual_stages(
    spec: VisionSpec | None,
    modality: str | None,
    patches: Sequence[Patches],
    vision: Sequence[Array],
    features: Sequence[Array],
) -> dict[Key, Array]:
    """Stages of the visuals of one modality, one array a visual in each argument."""
    grids = [patch.grid for patch in patches]
    whole = {
        "pixel_values": [patch.pixel_values for patch in patches],
        "vision": list(vision),
        "projector": list(features),
    }
    if modality is not None:
        whole[f"projector_{modality}"] = list(features)
        whole[f"{modality}_grid_thw"] = [np.array([grid]) for grid in grids]
    found: dict[Key, Array] = {}
    for stage, arrays in whole.items():
        # A stage whose name tells the modality may come with or without it.
        for key in (
            {modality, None} if stage.startswith(f"{modality}_") or stage.endswith(f"_{modality}") else {modality}
        ):
            found[stage, key, None] = np.concatenate(arrays)
            found |= {(stage, key, index): array for index, array in enumerate(arrays)}
    if spec is not None:
        indices = vision_inputs(spec, grids)
        found |= {(f"extra.{name}", modality, None): array for name, array in indices.items()}
        if "window_index" in indices:
            rows = np.concatenate(vision)
            blocks = rows.reshape(len(indices["window_index"]), -1, rows.shape[-1])
            window_order = blocks[indices["window_index"]].reshape(rows.shape)
            found["extra.vision_window_order", modality, None] = window_order
    return found


def _split(rows: Array, sizes: Sequence[int]) -> list[Array]:
    """Cuts rows into runs of these sizes, which add up to all of them."""
    assert sum(sizes) == len(rows), (len(rows), list(sizes))
    return np.split(rows, np.cumsum(sizes)[:-1])
