"""What goes into the decoder and out of it when one token is added: buffers made once a cache, written in place.

A step then allocates nothing but the row of logits that it returns, and binds nothing but the mask, which grows. The
buffers are where the session computes; `Buffer` is the one place that knows how values get there and back.

D  hidden size     V  vocabulary
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .session import Array, Device, GraphSession, ort_value

__all__ = ["Buffer", "StepBuffers"]


class Buffer:
    """An array of fixed shape on a device. On the CPU the OrtValue and the numpy array are the same memory."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, device: Device) -> None:
        self._host = np.zeros(shape, dtype)
        self._is_host = device == "cpu"
        self.value: Any = ort_value(self._host, device)

    def write(self, values: Array | int) -> None:
        """Puts values in their place, cast to the buffer's dtype."""
        self._host[...] = values
        if not self._is_host:
            self.value.update_inplace(self._host)

    def read(self) -> Array:
        """A float32 copy of what the graph wrote."""
        held = self._host if self._is_host else self.value.numpy()
        return held.astype(np.float32)


class StepBuffers:
    """A binding of the whole graph for one new token."""

    def __init__(
        self,
        session: GraphSession,
        binding: Any,
        max_length: int,
        constants: Mapping[str, Array],
        indices: Mapping[str, Array],
        *,
        fixed_mask: bool = False,
    ) -> None:
        """binding: an IOBinding that has the cache's buffers already. constants and indices: inputs that stay as they
        are, read on the host and on the device.

        fixed_mask: the mask has the full length, zeros behind the tokens held, and a place of its own (CUDA graphs).
        """
        specs = session.inputs
        width, vocabulary = specs["inputs_embeds"].shape[-1], session.outputs["logits"].shape[-1]
        assert isinstance(width, int), width
        assert isinstance(vocabulary, int), vocabulary
        rows = (3, 1, 1) if len(specs["position_ids"].shape) == 3 else (1, 1)
        device = session.device
        self._binding = binding
        self._device: Device = device
        self._embeds = Buffer((1, 1, width), specs["inputs_embeds"].dtype, device)
        self._positions = Buffer(rows, specs["position_ids"].dtype, device)
        self._logits = Buffer((1, 1, vocabulary), session.outputs["logits"].dtype, device)
        self._ones = np.ones((1, max_length), specs["attention_mask"].dtype)
        self._mask = Buffer((1, max_length), specs["attention_mask"].dtype, device) if fixed_mask else None
        if self._mask is not None:
            binding.bind_ortvalue_input("attention_mask", self._mask.value)
        binding.bind_ortvalue_input("inputs_embeds", self._embeds.value)
        binding.bind_ortvalue_input("position_ids", self._positions.value)
        binding.bind_ortvalue_output("logits", self._logits.value)
        for name, array in session.cast(constants).items():
            binding.bind_ortvalue_input(name, ort_value(array))  # read on the host, whatever the device
        for name, array in session.cast(indices).items():
            binding.bind_ortvalue_input(name, ort_value(array, device))

    def fill(self, embeds_D: Array, position: int, total: int) -> Any:
        """Puts a token in; total: tokens in the cache after it. Returns the binding to run."""
        self._embeds.write(embeds_D)
        self._positions.write(position)
        if self._mask is not None:
            self._mask.write(np.arange(self._ones.shape[1]) < total)
        else:  # a view of the ones: its length tells the graph how many tokens the cache has
            self._binding.bind_ortvalue_input("attention_mask", ort_value(self._ones[:, :total], self._device))
        return self._binding

    def logits(self) -> Array:
        """Logits float32 [V] of the last run, a copy."""
        return self._logits.read()[0, 0]
