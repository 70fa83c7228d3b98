"""A variant of a package at work, one stage at a time, to be measured in a process of its own (process.Actor)."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmport.cli.bench import drawn_image
from vlmport.runtime.cache import Cache
from vlmport.runtime.model import Model
from vlmport.runtime.sample import Sampler, SamplingParams

from .process import Memory, reset_peak

__all__ = ["Loaded", "Runtime", "VisionRun"]


@dataclass(frozen=True)
class Loaded:
    """What it costs to have all graphs open."""

    seconds: float
    before: Memory  # the interpreter with its libraries
    after: Memory


@dataclass(frozen=True)
class VisionRun:
    """One call of the vision encoder and the projector."""

    num_patches: int
    seconds: float
    peak_above: int  # bytes, largest resident set of the call less the one before it


class Runtime:
    """The stages of `vlmport run`, each by itself."""

    def __init__(self, package: Path, variant: str) -> None:
        self.model = Model.load(package, variant)
        self._ids = np.random.default_rng(0)
        self._cache: Cache | None = None
        self._peak = 0

    def load(self, roles: Sequence[str] | None = None) -> Loaded:
        """Opens the graphs of these roles (all by default)."""
        before = Memory.of()
        started = time.perf_counter()
        for role in roles or self.model.manifest.roles:
            self.model.session(role)
        return Loaded(time.perf_counter() - started, before, Memory.of())

    def peak(self) -> int:
        """The largest resident set so far, in bytes."""
        return max(self._peak, Memory.of().peak)

    def vision(self, sizes: Sequence[tuple[int, int]]) -> VisionRun:
        """Images of these sizes (width, height) in one call."""
        images = [{"type": "image", "image": drawn_image(*size)} for size in sizes]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*images, {"type": "text", "text": "Compare."}]}]
        prepared = self.model.prepare(messages)
        self._peak = self.peak()
        reset_peak()
        before = Memory.of()
        started = time.perf_counter()
        self.model.encode_vision(prepared.visuals)
        seconds = time.perf_counter() - started
        patches = sum(visual.num_patches for visual in prepared.visuals)
        return VisionRun(patches, seconds, Memory.of().peak - before.resident)

    def start(self, num_tokens: int) -> None:
        """An empty cache for so many tokens, in place of the one before. Waits for what goes on after a load."""
        self.model.session("decoder")
        for thread in threading.enumerate():
            if thread.name == "join-pages":
                thread.join()
        self._cache = self.model.new_cache(num_tokens)

    def prefill(self, num_tokens: int) -> float:
        """Puts random tokens through the decoder, on top of what the cache holds. Seconds."""
        assert self._cache is not None, "start comes first"
        ids = self._ids.integers(256, 10_000, num_tokens)
        started = time.perf_counter()
        prepared = self.model.prepare_ids(ids)
        positions = prepared.position_ids + self._cache.length
        self.model.prefill(self.model.embed(prepared), positions, self._cache)
        return time.perf_counter() - started

    def decode(self, num_tokens: int) -> float:
        """Greedy tokens, one at a time, as a request has them: embedding, decoder, choice. Seconds."""
        assert self._cache is not None, "start comes first"
        sampler = Sampler(SamplingParams(temperature=0.0), [])
        token = 256
        started = time.perf_counter()
        for _ in range(num_tokens):
            token = sampler(self.model.step(token, self._cache))
        return time.perf_counter() - started

    def steady(self, num_steps: Sequence[int]) -> list[int]:
        """Bytes of memory of its own after so many decode steps in all, at each count.

        The cache is written once before, so that no step is the first to touch its memory. Pages of mapped files do not
        count: each new token maps some more of the embedding's table.
        """
        cache = self._cache = self.model.new_cache(max(num_steps))
        self.prefill(max(num_steps))
        cache.reset()
        found: list[int] = []
        done = 0
        for count in num_steps:
            self.decode(count - done)
            done = count
            found.append(Memory.of().anonymous)
        return found
