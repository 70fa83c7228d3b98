"""Decode speed of the variants of one table: decoders alone, all of them in one loop.

What disturbs the box for a moment disturbs every variant alike, and the median of the rounds leaves it out.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmport.runtime.cache import Cache
from vlmport.runtime.model import Model
from vlmport.runtime.session import Array

__all__ = ["decode_speeds"]

_ROUNDS, _STEPS = 25, 8  # steps of one decoder follow one another, as they do in use


@dataclass(frozen=True)
class _Decoder:
    """A decoder behind a prompt, and what it is given a step."""

    model: Model
    cache: Cache
    embeds: Array  # [D]
    prompt: int  # tokens
    rope_delta: int

    def seconds(self) -> float:
        """Of some steps behind the prompt."""
        self.cache.length = self.prompt
        started = time.perf_counter()
        for _ in range(_STEPS):
            self.model.decoder.step(self.embeds, self.cache.length + self.rope_delta, self.cache)
        return time.perf_counter() - started


def decode_speeds(
    variants: Sequence[tuple[Path, str]],
    messages: Sequence[Mapping[str, Any]],
    progress: Callable[[int, int, str], None],
) -> list[float]:
    """Tokens a second of each variant, by package and name, behind the prompt that `messages` make."""
    with ExitStack() as stack:
        decoders = [_decoder(stack.enter_context(Model.load(*variant)), messages) for variant in variants]
        times: list[list[float]] = [[] for _ in decoders]
        for number in range(_ROUNDS + 1):
            progress(number, _ROUNDS + 1, "speed")
            for decoder, taken in zip(decoders, times, strict=True):
                taken.append(decoder.seconds())
    return [_STEPS / statistics.median(taken[1:]) for taken in times]


def _decoder(model: Model, messages: Sequence[Mapping[str, Any]]) -> _Decoder:
    prepared = model.prepare(list(messages))
    seen = model.features(prepared)
    embeds_SD = model.embed(prepared, seen.features if seen else None)
    cache = model.new_cache(len(embeds_SD) + _STEPS)
    model.prefill_prepared(prepared, embeds_SD, cache)
    return _Decoder(model, cache, embeds_SD[-1], cache.length, prepared.rope_delta)
