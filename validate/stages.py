"""What a variant computes for one prompt, stage by stage, in the order in which a request goes through it.

Runtime only: no torch, no safetensors. Dims: S prompt tokens, P patches, C vision width, R visual rows, D width of a
token embedding, V vocabulary, N forced tokens, L layers, K key/value heads, H head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.model import Model, Prepared

__all__ = ["Stages", "greedy_ids", "run_stages"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Stages:
    """Outputs of the graphs for one prompt, float32. Visual rows are in the order of the prompt's placeholders."""

    vision: Array | None  # [P, C], natural patch order; None: text only
    features: Array | None  # [R, D]
    inputs_embeds: Array  # [S, D]
    prefill_logits: Array  # [S, V]
    step_logits: Array  # [1 + N, V]: row 0 is the prefill's last, row i follows the i-th forced token
    past_keys: tuple[Array, ...]  # L of [K, S, H], after the prefill
    past_values: tuple[Array, ...]


def run_stages(model: Model, prepared: Prepared, forced_ids: Sequence[int] = ()) -> Stages:
    """Prefill, then one step through the cache for each of `forced_ids` (teacher forcing)."""
    visual = model.features(prepared)
    features = None if visual is None else visual.features
    embeds = model.embed(prepared, features)
    cache = model.new_cache(len(prepared.input_ids) + len(forced_ids) + 1)
    prefill_logits = model.prefill(embeds, prepared.position_ids, cache, all_logits=True)
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


def greedy_ids(logits_NV: Array) -> Array:
    """Largest logit a row, the first of equals: what greedy decoding picks. int64 [N]."""
    return logits_NV.argmax(axis=-1).astype(np.int64)


def _float32(array: Array) -> Array:
    return array.astype(np.float32)
