"""Which provider runs which node of a package's graphs, as ONNX Runtime's own profile of one small request tells it."""

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .model import Model
from .opened import LoadOptions
from .package import Package
from .session import GraphSession, open_session

__all__ = ["CPU", "CUDA", "NO_KERNEL", "SHAPES", "UNKNOWN", "PlacedNode", "RolePlacement", "measure"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
NO_KERNEL = "no CUDA kernel for these types"
SHAPES = "arithmetic on shapes, which ONNX Runtime keeps on the CPU"
UNKNOWN = "not in the table of kernels"
_SIDE = 112  # pixels of the made-up picture: several patches, more than one window
_ALWAYS_WHOLE = {"int64", "int32", "bool"}
_COPIES = {"MemcpyToHost", "MemcpyFromHost"}


@dataclass(frozen=True)
class PlacedNode:
    """A node of a graph as it runs, after fusions. `reason` says why it is not where the target wants it."""

    name: str
    operator: str
    inputs: tuple[str, ...]  # dtypes
    provider: str
    reason: str | None = None


@dataclass(frozen=True)
class RolePlacement:
    """The nodes of one graph. `copies`: how many of them move a value between CPU and GPU."""

    nodes: tuple[PlacedNode, ...]
    copies: int


def measure(package: Package, variant: str) -> dict[str, RolePlacement]:
    """Runs a small request (a picture, if the package sees, and a word) and tells where each node ran, by role.

    Nodes that the request does not reach are missing. Raises MissingDependencyError without the target's provider,
    PackageError for a graph that cannot run.
    """
    with tempfile.TemporaryDirectory(prefix="vlmport-profile-") as folder:
        model = _Profiled(package, variant, Path(folder))
        _run_request(model)
        return model.placements()


class _Profiled(Model):
    """A model whose graphs write down what they run."""

    def __init__(self, package: Package, variant: str, folder: Path) -> None:
        super().__init__(package, variant, LoadOptions())
        self._folder = folder
        self._profiled: dict[str, GraphSession] = {}

    def session(self, role: str) -> GraphSession:
        if role not in self._profiled:
            path = self.package.graph_path(role, self.variant.name)
            self._profiled[role] = open_session(path, self.manifest.target, profile=self._folder / role)
        return self._profiled[role]

    def placements(self) -> dict[str, RolePlacement]:
        """What ran, by role, in the order of the manifest."""
        found = {role: _read(Path(session.raw.end_profiling())) for role, session in self._profiled.items()}
        return {role: _placement(found[role], self.manifest.target) for role in self.manifest.roles if role in found}


def _run_request(model: Model) -> None:
    picture = Image.new("RGB", (_SIDE, _SIDE), "gray")
    if "decoder" not in model.manifest.roles:
        model.encode_images([picture])
        return
    seen: list[dict[str, Any]] = [{"type": "image", "image": picture}] if model.manifest.image is not None else []
    message = {"role": "user", "content": [*seen, {"type": "text", "text": "a"}]}
    model.generate([message], max_new_tokens=2, temperature=0.0, ignore_eos=True)


def _read(file: Path) -> list[dict[str, Any]]:
    """The events of nodes in a profile of ONNX Runtime."""
    events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _placement(events: Iterable[dict[str, Any]], target: str) -> RolePlacement:
    """One node an index: it runs once a call, or once a round of its loop."""
    nodes: dict[tuple[str, str], PlacedNode] = {}
    for event in events:
        args = event["args"]
        name = re.sub(r"_kernel_time$", "", event["name"])
        inputs = tuple(next(iter(dtype), "") for dtype in args["input_type_shape"])
        outputs = tuple(next(iter(dtype), "") for dtype in args["output_type_shape"])
        reason = None
        if target == "cuda" and args["provider"] == CPU:
            reason = SHAPES if _ALWAYS_WHOLE.issuperset((*inputs, *outputs)) else NO_KERNEL
        node = PlacedNode(name, args["op_name"], tuple(map(_plain, inputs)), args["provider"], reason)
        nodes[name, args["node_index"]] = node
    placed = tuple(nodes.values())
    return RolePlacement(placed, sum(node.operator in _COPIES for node in placed))


def _plain(dtype: str) -> str:
    """As the rest of vlmport says it."""
    return {"float": "float32", "double": "float64"}.get(dtype, dtype)
