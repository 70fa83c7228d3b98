"""Writing the graphs of one variant: shared by export and a later `quantize`, so that their bytes are equal."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from ..runtime.manifest import FileEntry, GraphFile, Variant
from ..runtime.schema import to_json
from .balance import balance
from .recipe import Recipe, Target, file_stem, precision_label
from .rewrite import rewrite
from .store import Content, Place, Progress, WeightSource, places, write_graph

__all__ = ["OpenRole", "write_variant"]

_TABLES = "embed_tokens"  # a tied head is the table of this role

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

    Equal precision labels mean equal content, so such graphs are shared; and a head that is tied to the table of the
    embedding is read from there where both are stored alike. Names of the new files begin with "onnx/".
    """
    graphs: dict[str, GraphFile] = {}
    files: dict[str, FileEntry] = {}
    known: dict[Content, Place] = {}
    for role in sorted(roles, key=lambda role: role != _TABLES):  # what it has, others need not store
        label = precision_label(recipe, role, target)
        stem = file_stem(role, label)
        alike = [variant.graphs[role] for variant in present.values() if variant.graphs[role].precision == label]
        if alike:
            graphs[role] = alike[0]
            if role != _TABLES:
                continue
        model, source = open_role(role)
        stored, source = balance(model, rewrite(model, role, recipe, target), source)
        if role == _TABLES:
            known = places(model, stored, source, stem)
        if not alike:
            written = write_graph(
                model, stored, source, folder, stem, _named(progress, stem), known={} if role == _TABLES else known
            )
            graphs[role] = written.graph_file(label)
            files |= {f"onnx/{name}": entry for name, entry in written.files.items()}
    graphs = {role: graphs[role] for role in roles}
    return Variant(recipe.name, to_json(recipe), graphs), files


def _named(progress: Progress | None, stem: str) -> Progress | None:
    """The same progress, telling the file beside the parameter."""
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{stem} {what}")
