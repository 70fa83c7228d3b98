"""A model that remembers what each of its graphs was fed, so that a graph can be run again with its insides showing.

The runtime's own code prepares, places and feeds everything; only the sessions are others: graphs run in pieces, so
that a model larger than memory can be looked into, and a cache is handed over without the padding of its buffers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.model import Model
from ..runtime.opened import LoadOptions
from ..runtime.package import Package
from ..runtime.session import GraphSession
from .pieces import PiecedGraph

__all__ = ["Call", "TappedModel"]

Array = NDArray[Any]
_WHOLE = 1 << 30  # tokens: more than any prompt
_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class Call:
    """One run of a graph."""

    role: str
    graph: Path
    feeds: Mapping[str, Array]


class TappedModel(Model):
    """A model that keeps `calls`, in their order. Runs on the CPU; a prompt is one call."""

    def __init__(self, package: Package, variant: str, video_rule: str | None = None) -> None:
        super().__init__(package, variant, LoadOptions(prefill_chunk=_WHOLE, video_rule=video_rule))
        self.calls: list[Call] = []

    def session(self, role: str) -> GraphSession:
        if role not in self._sessions:
            path = self.package.graph_path(role, self.variant.name)
            self._sessions[role] = GraphSession(_TappedGraph(path, role, self.calls), path, "cpu")
        return self._sessions[role]


class _Binding:
    """An IOBinding that only remembers."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, ort_value: Any) -> None:
        self.inputs[name] = ort_value

    def bind_ortvalue_output(self, name: str, ort_value: Any) -> None:
        self.outputs[name] = ort_value


class _TappedGraph(PiecedGraph):
    def __init__(self, path: Path, role: str, calls: list[Call]) -> None:
        opened = PiecedGraph.open(path)
        super().__init__(opened.model, path.parent)
        self._path, self._role, self._calls = path, role, calls

    def get_modelmeta(self) -> SimpleNamespace:
        """What the graph says of itself."""
        return SimpleNamespace(custom_metadata_map={entry.key: entry.value for entry in self.model.metadata_props})

    def io_binding(self) -> _Binding:
        return _Binding()

    def run(self, names: Sequence[str], feeds: Mapping[str, Array], options: Any = None) -> list[Array]:
        self._calls.append(Call(self._role, self._path, dict(feeds)))
        return super().run(names, feeds, options)

    def run_with_iobinding(self, binding: _Binding, options: Any = None) -> None:
        """Runs on what is bound and writes where it is bound."""
        feeds = {name: value.numpy().copy() for name, value in binding.inputs.items()}  # buffers are written again
        held = feeds["attention_mask"].shape[1] - feeds["inputs_embeds"].shape[1]
        feeds = {name: array[:, :, :held] if name.startswith(_PAST) else array for name, array in feeds.items()}
        names = list(binding.outputs)
        for name, array in zip(names, self.run(names, feeds, options), strict=True):
            buffer = binding.outputs[name]
            if name.startswith(_PRESENT):
                padded = buffer.numpy()
                padded[:, :, : array.shape[2]] = array
                array = padded
            buffer.update_inplace(np.ascontiguousarray(array))
