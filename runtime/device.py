"""CUDA graphs of the decode step: the kernels of a step are launched as one, which saves the host a call a kernel.

A graph is captured with the addresses and shapes of its first run, and replayed with them. So a cache whose step is a
graph has buffers that live on when its answer is finished, for the next answer; the mask has the full length, and
prompts, whose shapes differ, are not captured. Captured calls are told apart by an id (`gpu_graph_id`, ONNX Runtime's
documentation of the CUDA provider); -1 is a call that is not captured. Capture runs the step more than once, which
changes nothing here: each run writes the same row of the cache.
"""

import copy
import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

from .cache import Cache

__all__ = ["NOT_CAPTURED", "StepGraphs", "graph_run_options"]

NOT_CAPTURED = -1
_SHORTEST = 256  # tokens


class StepGraphs:
    """Lends caches, each with a graph of its own; one that nobody holds any more is lent again, buffers and all."""

    def __init__(self, make: Callable[[int], Cache], longest: int) -> None:
        """make: a cache of a given length, with its step's buffers. longest: the most tokens a cache may have."""
        self._make = make
        self._longest = longest
        self._idle: list[Cache] = []
        self._num_graphs = 0
        self._lock = threading.Lock()

    def lend(self, max_length: int) -> Cache:
        """An empty cache for at least `max_length` tokens. Lengths are powers of two, so that few graphs serve all."""
        capacity = _SHORTEST
        while capacity < max_length:
            capacity *= 2
        capacity = max(min(capacity, self._longest), max_length)
        with self._lock:
            owner = next((cache for cache in self._idle if cache.max_length == capacity), None)
            if owner is not None:
                self._idle.remove(owner)
            else:
                self._num_graphs += 1
                owner = self._make(capacity)
                owner.step_options = graph_run_options(self._num_graphs)
        lent = copy.copy(owner)  # the same buffers and bindings, a length of its own
        lent.max_length = max_length
        lent.reset()
        weakref.finalize(lent, self._idle.append, owner)
        return lent


def graph_run_options(graph_id: int) -> Any:
    """ONNX Runtime's options for a call of a session with CUDA graphs."""
    options = importlib.import_module("onnxruntime").RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
