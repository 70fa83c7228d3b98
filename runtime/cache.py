"""The decoder's key/value cache: buffers of full length, written in place.

    K  key/value heads     C  cache length (capacity)     H  head size

Each layer has one buffer for keys and one for values, [1, K, C, H]. The same OrtValue is bound as
`past_key_values.N.key` and as `present.N.key`: GroupQueryAttention then writes the new rows where they belong and
copies nothing. The graph says what a row is: floats, or int8 codes whose scales it holds (a recipe's cache in 8 bits).
"""

import base64
import math
from typing import Any

import numpy as np

from .buffers import StepBuffers
from .errors import CapacityError, InputError
from .manifest import CacheSpec
from .session import Array, GraphSession, ort_value

__all__ = ["Cache", "cache_names", "check_cache_limit", "plan_cache_length"]

_ROUNDING = 64  # tokens; a few spare rows cost little


class Cache:
    """Keys and values of one sequence, bound to one session. `length` tokens of `max_length` are held."""

    def __init__(self, session: GraphSession, spec: CacheSpec, max_length: int) -> None:
        """Allocates on the session's device. Raises InputError for a length below 1."""
        if max_length < 1:
            raise InputError(f"cache length: {max_length} is not at least 1")
        self.max_length = max_length
        self.length = 0
        shape = (1, spec.num_kv_heads, max_length, spec.head_dim)
        # Fresh zero pages cost no memory until they are written, so a long cache is as cheap as what it holds.
        self._buffers: dict[str, Any] = {}
        self._names = cache_names(spec.num_layers)
        for past, _ in self._names:
            self._buffers[past] = ort_value(_zeros(shape, session.inputs[past].dtype, spec), session.device)
        self._session = session
        # Kept: a call rebinds only what changes from call to call. Prompts have one, single tokens another.
        self.prefill_binding = self.new_binding()
        self.step_buffers: StepBuffers | None = None  # made by the decoder's first step
        self.step_options: Any = None  # ONNX Runtime's RunOptions of a step, where it is a CUDA graph

    def new_binding(self) -> Any:
        """An IOBinding that reads and writes these buffers; all other inputs and outputs are still to be bound."""
        binding = self._session.raw.io_binding()
        for past, present in self._names:
            binding.bind_ortvalue_input(past, self._buffers[past])
            binding.bind_ortvalue_output(present, self._buffers[past])
        return binding

    def require(self, num_tokens: int) -> None:
        """Raises CapacityError unless `num_tokens` more fit."""
        if self.length + num_tokens > self.max_length:
            raise CapacityError(
                f"the cache of {self.max_length} tokens holds {self.length} and cannot take {num_tokens} more: "
                "make it longer (new_cache(max_length), --cache-length) or shorten the prompt"
            )

    def advance(self, num_tokens: int) -> None:
        """Counts tokens that the decoder has just written."""
        assert 0 < num_tokens <= self.max_length - self.length, (num_tokens, self.length, self.max_length)
        self.length += num_tokens

    def reset(self) -> None:
        """Forgets the sequence. What the buffers hold beyond `length` is never read."""
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """What the buffers hold when they are full."""
        return sum(buffer.numpy().nbytes for buffer in self._buffers.values())

    def keys(self, layer: int) -> Array:
        """Keys of a layer after rotary, a copy [K, length, H]."""
        return self._held(f"past_key_values.{layer}.key")

    def values(self, layer: int) -> Array:
        """Values of a layer, a copy [K, length, H]."""
        return self._held(f"past_key_values.{layer}.value")

    def _held(self, name: str) -> Array:
        held = self._buffers[name].numpy()[0, :, : self.length].copy()
        for what in ("scale", "factors"):  # of codes, or of what float16 has no room for; of what a recipe has balanced
            noted = self._session.metadata(f"{name}.{what}")
            if noted is not None:
                values = np.frombuffer(base64.b64decode(noted), np.float32)
                held = held * (values if len(values) == 1 else values.reshape(len(held), 1, -1))
        return held


def cache_names(num_layers: int) -> list[tuple[str, str]]:
    """(past, present) names of the decoder's cache inputs and outputs, layer by layer, key before value."""
    return [
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
        for layer in range(num_layers)
        for part in ("key", "value")
    ]


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any], spec: CacheSpec) -> Array:
    try:
        return np.zeros(shape, dtype)
    except MemoryError:
        size = 2 * spec.num_layers * math.prod(shape) * dtype.itemsize
        raise CapacityError(
            f"a cache of {shape[2]} tokens takes {size / 1e9:.1f} GB, more than there is: lower --cache-length "
            "(cache_length) or --max-new-tokens"
        ) from None


def check_cache_limit(spec: CacheSpec, limit: int | None) -> None:
    """Raises InputError unless a user's cache length is positive and within what the model was made for."""
    if limit is not None and not 1 <= limit <= spec.max_length:
        raise InputError(f"cache length: {limit} is not between 1 and the {spec.max_length} tokens of this model")


def plan_cache_length(spec: CacheSpec, num_prompt_tokens: int, max_new_tokens: int, limit: int | None = None) -> int:
    """How long a cache to allocate for a request: what it needs, rounded up, within the limits.

    limit: the user's cache length, if any. Raises CapacityError for a prompt that does not fit by itself; room for
    fewer than `max_new_tokens` is no error, the answer then ends early with finish_reason "length".
    """
    check_cache_limit(spec, limit)
    if limit is not None and num_prompt_tokens > limit:
        raise CapacityError(
            f"the prompt has {num_prompt_tokens} tokens and the cache holds {limit}: raise --cache-length "
            f"(cache_length, at most {spec.max_length} here), shorten the prompt, or give fewer or smaller images"
        )
    if num_prompt_tokens > spec.max_length:
        raise CapacityError(
            f"the prompt has {num_prompt_tokens} tokens and the model was made for {spec.max_length}: "
            "shorten the prompt, or give fewer or smaller images (max_pixels)"
        )
    needed = -(-(num_prompt_tokens + max_new_tokens) // _ROUNDING) * _ROUNDING
    return min(needed, limit or spec.max_length)
