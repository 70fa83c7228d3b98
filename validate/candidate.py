"""The variant's stages under the names that golden folders use.

A key is (stage, modality, index): modality None counts all visuals of the prompt in the order of their placeholders;
index picks one image or clip, None all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.connector import num_shown_frames
from ..runtime.image import Patches
from ..runtime.manifest import ImageSpec, VisionSpec
from ..runtime.model import Model
from ..runtime.prepare import Prepared
from ..runtime.vision_inputs import vision_inputs
from .stages import Stages

__all__ = ["Key", "candidate_stages", "upstream_ids", "visible_tokens"]

Array = NDArray[Any]
Key = tuple[str, str | None, int | None]


def candidate_stages(model: Model, prepared: Prepared, stages: Stages) -> dict[Key, Array]:
    """Everything that the variant and its runtime can show of one prompt."""
    visible = visible_tokens(prepared)
    kept = slice(len(visible))
    found: dict[Key, Array] = {
        ("position_ids", None, None): prepared.position_ids[..., kept],
        ("extra.rope_deltas", None, None): np.array([prepared.rope_delta]),
        ("extra.input_ids", None, None): upstream_ids(prepared),
        ("extra.attention_mask", None, None): visible.astype(np.uint8),
        ("visual_token_mask", None, None): prepared.visual_tokens[kept].astype(np.uint8),
        ("inputs_embeds", None, None): stages.inputs_embeds[kept],
        ("prefill_logits", None, None): stages.prefill_logits,
        ("prefill_logits_last", None, None): stages.prefill_logits[-1],
        ("step_logits", None, None): stages.step_logits,
    }
    for layer, (keys, values) in enumerate(zip(stages.past_keys, stages.past_values, strict=True)):
        found[f"past_key.{layer}", None, None] = keys
        found[f"past_value.{layer}", None, None] = values
    if stages.features is None:
        return found
    vision = None
    if stages.vision is not None:
        first = 0 if model.manifest.vision is None else model.manifest.vision.first_rows  # class tokens, one a frame
        sizes = [len(patches.pixel_values) + patches.grid[0] * first for patches in prepared.visuals]
        vision = _split(stages.vision, sizes)
    features = _split(stages.features, [run.length for run in prepared.runs])
    for modality in (None, "image", "video"):
        picked = [i for i, run in enumerate(prepared.runs) if modality in (None, run.kind)]
        if picked:
            shown = [prepared.visuals[i] for i in picked]
            vision_spec = model.manifest.vision
            hidden = (
                None if vision is None else [_as_shown(vision_spec, prepared.visuals[i], vision[i]) for i in picked]
            )
            found |= _visual_stages(model.manifest.vision, modality, shown, hidden, [features[i] for i in picked])
            image = model.manifest.image
            if image is not None and image.slices is not None:
                found |= _tile_stages(image, modality, shown)
            elif image is not None and image.strategy == "fixed_area":
                found |= _image_stages(image, modality, shown)
            elif image is not None and image.square is not None:
                found |= _frame_stages(image, modality, shown)
    return found


def visible_tokens(prepared: Prepared) -> Array:
    """Which tokens of a prompt the decoder sees, bool [S]; without those that are cut off at its end."""
    if prepared.visible is None:
        return np.ones(len(prepared.input_ids), bool)
    return prepared.visible[: np.flatnonzero(prepared.visible)[-1] + 1]


def upstream_ids(prepared: Prepared) -> Array:
    """The ids as upstream's generate gets them: a placeholder that is no token stands there once."""
    kept = np.ones(len(prepared.input_ids), bool)
    for run in prepared.runs:
        if prepared.input_ids[run.start] < 0:
            kept[run.start + 1 : run.start + run.length] = False
    return prepared.input_ids[kept]


def _tile_stages(spec: ImageSpec, modality: str | None, tiles: Sequence[Patches]) -> dict[Key, Array]:
    """Pixels of tiles as upstream lays them out: a strip [3, p, p * patches] a tile, one flat row all together."""
    size = spec.patch_size
    strips = [tile.pixel_values.reshape(-1, 3, size, size).transpose(1, 2, 0, 3).reshape(3, size, -1) for tile in tiles]
    bytes_ = [_bytes(spec, strip) for strip in strips]
    found: dict[Key, Array] = {("tgt_sizes", modality, None): np.array([tile.grid[1:] for tile in tiles])}
    for stage, arrays in (("pixel_values", strips), ("pixels_u8", bytes_)):
        found[stage, modality, None] = np.concatenate([array.reshape(-1) for array in arrays])
        found |= {(stage, modality, index): array for index, array in enumerate(arrays)}
    return found


def _image_stages(spec: ImageSpec, modality: str | None, images: Sequence[Patches]) -> dict[Key, Array]:
    """Pixels of images as upstream lays them out: [3, height, width] each."""
    size, merge = spec.patch_size, spec.merge_size
    found: dict[Key, Array] = {}
    for index, image in enumerate(images):
        _, h, w = image.grid
        blocks = image.pixel_values.reshape(h // merge, w // merge, merge, merge, 3, size, size)
        pixels = blocks.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, h * size, w * size)
        found["pixel_values", modality, index] = pixels
        found["pixels_u8", modality, index] = _bytes(spec, pixels)
    return found


def _frame_stages(spec: ImageSpec, modality: str | None, visuals: Sequence[Patches]) -> dict[Key, Array]:
    """Pixels of frames of one size as upstream lays them out: [frames, 3, height, width]; of one still [3, ...]."""
    size, found = spec.patch_size, dict[Key, Array]()
    clips: list[Array] = []
    for visual in visuals:
        t, h, w = visual.grid
        patches = visual.pixel_values.reshape(t, h, w, 3, size, size)
        clips.append(patches.transpose(0, 3, 1, 4, 2, 5).reshape(t, 3, h * size, w * size))
    bytes_ = [np.stack([_bytes(spec, frame) for frame in clip]) for clip in clips]
    for stage, arrays in (("pixel_values", clips), ("pixels_u8", bytes_)):
        found[stage, modality, None] = np.concatenate(arrays)
        found |= {(stage, modality, i): array if len(array) > 1 else array[0] for i, array in enumerate(arrays)}
    return found


def _as_shown(spec: VisionSpec | None, visual: Patches, rows: Array) -> Array:
    """Features of a still image as often as upstream encodes it: once for each of the equal frames it stands for."""
    if spec is None or spec.connector is None:
        return rows
    return np.tile(rows, (num_shown_frames(spec.connector, visual.grid) // visual.grid[0], 1))


def _bytes(spec: ImageSpec, pixels: Array) -> Array:
    """Normalised pixels [3, H, W] as the uint8 that they were."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    return np.rint((pixels * std + mean) / spec.rescale).astype(np.uint8)


def _visual_stages(
    spec: VisionSpec | None,
    modality: str | None,
    patches: Sequence[Patches],
    vision: Sequence[Array] | None,
    features: Sequence[Array],
) -> dict[Key, Array]:
    """Stages of the visuals of one modality, one array a visual in each argument."""
    grids = [patch.grid for patch in patches]
    whole = {
        "pixel_values": [patch.pixel_values for patch in patches],
        "projector": list(features),
    }
    if vision is not None:
        whole["vision"] = list(vision)
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
        if "window_index" in indices and vision is not None:
            rows = np.concatenate(vision)
            blocks = rows.reshape(len(indices["window_index"]), -1, rows.shape[-1])
            window_order = blocks[indices["window_index"]].reshape(rows.shape)
            found["extra.vision_window_order", modality, None] = window_order
    return found


def _split(rows: Array, sizes: Sequence[int]) -> list[Array]:
    """Cuts rows into runs of these sizes, which add up to all of them."""
    assert sum(sizes) == len(rows), (len(rows), list(sizes))
    return np.split(rows, np.cumsum(sizes)[:-1])
