"""`vlmport inspect --placement`: which provider runs which nodes, and why some are on the CPU.

With the provider of the package's target, ONNX Runtime tells it of one small request. Without a GPU it is predicted for
the cuda target, from a table of kernels; that reads the graphs, which takes the export extra.
"""

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..runtime.errors import MissingDependencyError
from ..runtime.package import Package
from ..runtime.placement import PlacedNode, measure
from .table import table

__all__ = ["GraphPlacement", "Group", "Placement", "placement", "render"]


@dataclass(frozen=True)
class Group:
    """Nodes of one operator on one provider; `inputs` are the dtypes where they tell why."""

    provider: str
    operator: str
    num_nodes: int
    reason: str | None = None
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphPlacement:
    """One graph. `copies`: values that are copied between CPU and GPU in a call."""

    num_nodes: dict[str, int]  # by provider
    copies: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Placement:
    """What `vlmport inspect --placement` tells, and with --json prints. `told_by` says what it rests on."""

    package: str
    target: str
    is_prediction: bool
    told_by: str
    variants: dict[str, dict[str, GraphPlacement]]  # by role


def placement(package: Package, variant: str | None) -> Placement:
    """The placement of one variant, or of all. Raises MissingDependencyError where neither way is open."""
    names = list(package.manifest.variants) if variant is None else [package.variant(variant).name]
    try:
        measured = {name: measure(package, name) for name in names}
    except MissingDependencyError as error:
        if package.manifest.target != "cuda":
            raise
        return _predicted(package, names, error)
    told_by = f"onnxruntime {importlib.import_module('onnxruntime').__version__}, one small request"
    variants = {
        name: {role: _graph(found.nodes, found.copies) for role, found in roles.items()}
        for name, roles in measured.items()
    }
    return Placement(str(package.path), package.manifest.target, False, told_by, variants)


def _predicted(package: Package, names: list[str], missing: MissingDependencyError) -> Placement:
    try:
        prediction = importlib.import_module("..export.placement", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnx_ir"):
            raise
        raise MissingDependencyError(
            f"{missing}; or predict the placement without a GPU, which takes {error.name}: `pip install "
            "'vlmport[export]'`"
        ) from error
    variants: dict[str, dict[str, GraphPlacement]] = {}
    for name in names:
        found = {role: prediction.predict_file(package.graph_path(role, name)) for role in package.manifest.roles}
        variants[name] = {role: _graph(graph.nodes, graph.copies) for role, graph in found.items()}
    told_by = f"a table of the kernels of {prediction.VERSION}, before fusions; nothing was run"
    return Placement(str(package.path), package.manifest.target, True, told_by, variants)


def _graph(nodes: Iterable[PlacedNode], copies: int) -> GraphPlacement:
    counted = Counter((node.provider, node.operator, node.reason, node.inputs if node.reason else ()) for node in nodes)
    groups = [
        Group(provider, operator, n, reason, dtypes) for (provider, operator, reason, dtypes), n in counted.items()
    ]
    groups.sort(key=lambda group: (group.provider, -group.num_nodes, group.operator, group.inputs))
    by_provider = Counter[str]()
    for group in groups:
        by_provider[group.provider] += group.num_nodes
    return GraphPlacement(dict(sorted(by_provider.items())), copies, tuple(groups))


def render(found: Placement) -> str:
    """The text that `vlmport inspect --placement` prints."""
    how = "PREDICTED from" if found.is_prediction else "told by"
    parts = [f"{found.package}, for {found.target}: {how} {found.told_by}"]
    for variant, roles in found.variants.items():
        for role, graph in roles.items():
            counts = ", ".join(f"{count} on {_short(name)}" for name, count in graph.num_nodes.items())
            copies = f", {graph.copies} copied between CPU and GPU a call" if found.target == "cuda" else ""
            rows = [(f"  {_short(g.provider)}", str(g.num_nodes), g.operator, _why(g)) for g in graph.groups]
            parts.append(f"{variant} {role}: {counts}{copies}\n{table((), rows, '<><<')}")
    return "\n\n".join(parts)


def _why(group: Group) -> str:
    return f"{group.reason} ({', '.join(group.inputs)})" if group.reason else ""


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")
