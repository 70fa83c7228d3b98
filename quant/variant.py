"""Writing the graphs of one variant: shared by export and a later `quantize`, so that their bytes are equal."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from ..runtime.manifest import FileEntry, GraphFile, Variant
from ..runtime.schema import to_json
from .recipe import Recipe, Target, file_stem, precision_label
from .rewrite import rewrite
from .store import Progress, WeightSource, write_graph

__all__ = ["OpenRole", "write_variant"]

OpenRole = Callable[[str], tuple[ir.Model, WeightSource]]  # role -> a float graph to change, and its weights


def write_variant(
    recipe: Recipe,
    target: Target,
    roles: Iterable[str],
    present: Mapping[str, Variant],
    open_role: OpenRole,
    folder: Path,
    progress: Progress | None = None,
) -> tuple[Variant, dict[str, FileEntry]]:
    """Writes into `folder` the graphs that no variant in `present` stores alike; gives the variant and the new files.

    Equal precision labels mean equal content, so such graphs are shared. Names of the new files begin with "onnx/".
    """
    graphs: dict[str, GraphFile] = {}
    files: dict[str, FileEntry] = {}
    for role in roles:
        label = precision_label(recipe, role, target)
        alike = [variant.graphs[role] for variant in present.values() if variant.graphs[role].precision == label]
        if alike:
            graphs[role] = alike[0]
            continue
        model, source = open_role(role)
        stored = rewrite(model, role, recipe, target)
        stem = file_stem(role, label)
        written = write_graph(model, stored, source, folder, stem, _named(progress, stem))
        graphs[role] = written.graph_file(label)
        files |= {f"onnx/{name}": entry for name, entry in written.files.items()}
    return Variant(recipe.name, to_json(recipe), graphs), files


def _named(progress: Progress | None, stem: str) -> Progress | None:
    """The same progress, telling the file beside the parameter."""
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{stem} {what}")
