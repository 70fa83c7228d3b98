"""What a variant computes for one prompt, stage by stage, in the order in which a request goes through it.

Runtime only: no torch, no safetensors. Dims: S prompt tokens, T those that the decoder sees (all, where none are
hidden), P patches, C vision width, R visual rows, D width of a token embedding, V vocabulary, N forced tokens,
L layers, K key/value heads, H head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.model import Model
from ..runtime.prepare import Prepared

__all__ = ["Stages", "logits_without_cache", "run_stages"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Stages:
    """Outputs of the graphs for one prompt, float32. Visual rows are in the order of the prompt's placeholders."""

    vision: Array | None  # [P, C], natural patch order; None: text only, or no vision encoder
    features: Array | None  # [R, D]
    inputs_embeds: Array  # [S, D]
    prefill_logits: Array  # [T, V]
    step_logits: Array  # [1 + N, V]: row 0 is the prefill's last, row i follows the i-th forced token
    past_keys: tuple[Array, ...]  # L of [K, T, H], after the prefill
    past_values: tuple[Array, ...]


def run_stages(model: Model, prepared: Prepared, forced_ids: Sequence[int] = ()) -> Stages:
    """Prefill, then one step through the cache for each of `forced_ids` (teacher forcing)."""
    visual = model.features(prepared)
    features = None if visual is None else visual.features
    embeds = model.embed(prepared, features)
    cache = model.new_cache(len(prepared.input_ids) + len(forced_ids) + 1)
    prefill_logits = model.prefill_prepared(prepared, embeds, cache, all_logits=True)
    layers = range(0 if model.manifest.cache is None else model.manifest.cache.num_layers)
    keys = tuple(_float32(cache.keys(layer)) for layer in layers)
    values = tuple(_float32(cache.values(layer)) for layer in layers)
    steps = [prefill_logits[-1]]
    steps += [model.step(int(token), cache, prepared.rope_delta) for token in forced_ids]
    return Stages(
        vision=None if visual is None else visual.vision,
        features=features,
        inputs_embeds=embeds,
        prefill_logits=prefill_logits,
        step_logits=np.stack(steps),
        past_keys=keys,
        past_values=values,
    )


def logits_without_cache(model: Model, prepared: Prepared, embeds: Array, forced_ids: Sequence[int]) -> Array:
    """What `run_stages` gives as step_logits [1 + N, V], by one prefill of prompt (`embeds` [S, D]) and answer."""
    embeds, positions = prepared.seen(embeds), prepared.seen_positions
    length, count = len(embeds), len(forced_ids)
    if count:
        answer = np.array([forced_ids], dtype=np.int64)
        more = model.session("embed_tokens").run({"input_ids": answer}, ["inputs_embeds"])["inputs_embeds"][0]
        embeds = np.concatenate([embeds, more.astype(np.float32)])
        steps = np.arange(length, length + count) + prepared.rope_delta
        positions = np.concatenate([positions, np.broadcast_to(steps, (*positions.shape[:-1], count))], axis=-1)
    visual = np.append(prepared.seen(prepared.visual_tokens), np.zeros(count, bool))
    cache = model.new_cache(length + count + 1)
    logits = model.prefill(embeds, positions, cache, visual_S=visual, all_logits=True)
    return logits[length - 1 :]


def _float32(array: Array) -> Array:
    return array.astype(np.float32)
