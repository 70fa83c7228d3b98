"""Runs the decoder graph on a cache: a prompt in chunks, then one token at a time.

S  tokens of a call     T  tokens held after the call     D  hidden size     V  vocabulary
"""

import numpy as np

from .buffers import StepBuffers
from .cache import Cache, cache_names
from .device import NOT_CAPTURED, StepGraphs, graph_run_options
from .errors import InputError, PackageError
from .manifest import CacheSpec
from .routing import ROUTING_INPUTS, TEXT_STEP, routing_inputs
from .session import Array, GraphSession, ort_value

__all__ = ["Decoder"]

_KEEP = "num_logits_to_keep"


class Decoder:
    """The decoder of a package. Caches are bound when they are made; a call rebinds only what changes."""

    def __init__(self, session: GraphSession, spec: CacheSpec, *, chunk: int = 256, step_graph: bool = False) -> None:
        """chunk: tokens of a prompt that go through the graph at once; it bounds the memory of a prefill.
        step_graph: steps are CUDA graphs, if the session was opened for them (see device.py).

        Raises PackageError where graph and manifest disagree about the cache, InputError for a chunk below 1.
        """
        if chunk < 1:
            raise InputError(f"prefill chunk: {chunk} is not at least 1")
        _check_cache_inputs(session, spec)
        names = [past for past, _ in cache_names(spec.num_layers)]
        routing = [name for name in ROUTING_INPUTS if name in session.inputs]
        session.expect(
            inputs=["inputs_embeds", "attention_mask", "position_ids", *routing, *names],
            outputs=["logits", *(present for _, present in cache_names(spec.num_layers))],
        )
        vocabulary = session.outputs["logits"].shape[-1]
        if not isinstance(vocabulary, int):
            raise PackageError(f"{session.path}: logits has no fixed last dimension; export the checkpoint again")
        self._session = session
        self._spec = spec
        self._chunk = chunk
        self._is_routed = bool(routing)  # visual tokens have weights of their own
        self._vocabulary = vocabulary
        self._graphs = StepGraphs(self._cache_of_graph, spec.max_length) if step_graph else None
        self._prompt_options = graph_run_options(NOT_CAPTURED) if step_graph else None

    def new_cache(self, max_length: int) -> Cache:
        """An empty cache on the decoder's device."""
        if self._graphs is not None:
            return self._graphs.lend(max_length)
        return Cache(self._session, self._spec, max_length)

    def prefill(
        self,
        embeds_SD: Array,
        position_ids: Array,
        cache: Cache,
        *,
        visual_S: Array | None = None,
        all_logits: bool = False,
    ) -> Array:
        """Puts S tokens through the decoder, in chunks, and adds them to the cache.

        position_ids: int64 [3, S] or [S], as the graph has it. visual_S: which tokens are rows of images, bool [S],
        for a graph that has weights of its own for them; None: none are. Returns float32 logits [1, V] of the last
        token, or [S, V]. Raises CapacityError, before anything is computed, where the cache is too short.
        """
        num_tokens = embeds_SD.shape[0]
        if num_tokens == 0:
            raise InputError("the prompt is empty: give it at least one token")
        assert position_ids.shape[-1] == num_tokens, (position_ids.shape, embeds_SD.shape)
        cache.require(num_tokens)
        visual: Array = np.zeros(len(embeds_SD), np.bool_) if visual_S is None else visual_S
        logits = np.empty((num_tokens if all_logits else 1, self._vocabulary), np.float32)
        for start in range(0, num_tokens, self._chunk):
            part = slice(start, start + self._chunk)
            rows = self._run(embeds_SD[part], position_ids[..., part], cache, visual[part], all_logits)
            logits[part if all_logits else slice(None)] = rows
        return logits

    def step(self, embeds_D: Array, position: int, cache: Cache) -> Array:
        """Puts one token through, at one position on all rows. Returns float32 logits [V].

        Raises CapacityError where the cache is full.
        """
        cache.require(1)
        if cache.step_buffers is None:
            cache.step_buffers = self._step_buffers(cache)
        binding = cache.step_buffers.fill(embeds_D, position, cache.length + 1)
        with self._session.told_by_file():
            self._session.raw.run_with_iobinding(binding, cache.step_options)
        cache.advance(1)
        return cache.step_buffers.logits()

    def _run(self, embeds_SD: Array, position_ids: Array, cache: Cache, visual_S: Array, all_logits: bool) -> Array:
        num_tokens = embeds_SD.shape[0]
        feeds = {
            "inputs_embeds": embeds_SD[None],
            "attention_mask": np.ones((1, cache.length + num_tokens), np.int64),
            "position_ids": np.expand_dims(position_ids, -2),  # [3, 1, S] or [1, S]
        }
        feeds |= self._switches(all_logits=all_logits)
        if self._is_routed:
            feeds |= routing_inputs(visual_S)
        binding = cache.prefill_binding
        for name, array in self._session.cast(feeds).items():
            binding.bind_ortvalue_input(name, ort_value(array))  # bind_cpu_input knows no optional input
        shape = (1, num_tokens if all_logits else 1, self._vocabulary)
        logits = np.empty(shape, self._session.outputs["logits"].dtype)
        binding.bind_ortvalue_output("logits", ort_value(logits))
        with self._session.told_by_file():
            self._session.raw.run_with_iobinding(binding, self._prompt_options)
        cache.advance(num_tokens)
        return logits[0].astype(np.float32, copy=False)

    def _step_buffers(self, cache: Cache) -> StepBuffers:
        constants = self._switches(all_logits=False)
        binding, fixed_mask = cache.new_binding(), self._graphs is not None
        indices = TEXT_STEP if self._is_routed else {}
        return StepBuffers(self._session, binding, cache.max_length, constants, indices, fixed_mask=fixed_mask)

    def _cache_of_graph(self, max_length: int) -> Cache:
        cache = Cache(self._session, self._spec, max_length)
        cache.step_buffers = self._step_buffers(cache)
        return cache

    def _switches(self, *, all_logits: bool) -> dict[str, Array]:
        """The input that says how many positions get logits (0: all), where the graph has it."""
        if _KEEP in self._session.optional or _KEEP in self._session.inputs:
            return {_KEEP: np.array([0 if all_logits else 1], np.int64)}
        if all_logits:
            raise PackageError(f"{self._session.path}: has no {_KEEP}, so no logits of all positions; export it again")
        return {}


def _check_cache_inputs(session: GraphSession, spec: CacheSpec) -> None:
    in_graph = [name for name in session.inputs if name.startswith("past_key_values.")]
    if len(in_graph) != 2 * spec.num_layers:
        raise PackageError(
            f"{session.path}: the graph has a cache of {len(in_graph) / 2:g} layers, cache.num_layers of vlmport.json "
            f"is {spec.num_layers}; export the checkpoint again"
        )
    for name in in_graph:
        found = session.inputs[name]
        shape = (found.shape[1], found.shape[3]) if len(found.shape) == 4 else found.shape
        said = (spec.num_kv_heads, spec.head_dim)
        fits = len(shape) == 2 and all(not isinstance(a, int) or a == b for a, b in zip(shape, said, strict=True))
        if not fits or found.dtype not in (np.dtype(spec.dtype), np.dtype(np.int8)):
            raise PackageError(
                f"{session.path}: {name} is {found.dtype} {list(found.shape)}, cache of vlmport.json says {spec.dtype} "
                f"[1, {spec.num_kv_heads}, length, {spec.head_dim}]; export the checkpoint again"
            )
