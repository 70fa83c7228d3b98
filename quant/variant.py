"""Writing the graphs of one variant: shared by export and a later `quantize`, so that their bytes are equal."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from ..runtime.errors import RecipeError
from ..runtime.manifest import Calibration, FileEntry, GraphFile, Variant
from ..runtime.schema import to_json
from .balance import balance
from .found import FoundRole
from .kv_cache import quantize_cache
from .recipe import Recipe, Target, file_stem, precision_label
from .rewrite import rewrite
from .store import Content, Place, Progress, WeightSource, places, write_graph

__all__ = ["Calibrate", "OpenRole", "OpenTables", "write_variant"]

_TABLES = "embed_tokens"  # a tied head is the table of this role

OpenRole = Callable[[str], tuple[ir.Model, WeightSource]]  # role -> a float graph to change, and its weights
# A stored graph of the tables, with the places of its weights, and where these come from; None where nobody knows.
OpenTables = Callable[[GraphFile], tuple[ir.Graph, WeightSource] | None]


class Calibrate(Protocol):
    """Data to calibrate on, and modules to run them through; the one there is has its home in export/calibrate.py."""

    record: Calibration

    def calibrate(self, recipe: Recipe, target: Target, open_role: OpenRole, folder: Path) -> dict[str, FoundRole]:
        """What the calibrated methods of a recipe find, by role; their files go below `folder`."""
        ...


def write_variant(
    recipe: Recipe,
    target: Target,
    roles: Iterable[str],
    present: Mapping[str, Variant],
    open_role: OpenRole,
    folder: Path,
    progress: Progress | None = None,
    *,
    open_tables: OpenTables = lambda _: None,
    calibrate: Calibrate | None = None,
) -> tuple[Variant, dict[str, FileEntry]]:
    """Writes into `folder` the graphs that no variant in `present` stores alike; gives the variant and the new files.

    `calibrate` is asked where a method of the recipe looks at activations. Raises RecipeError where it is missing.
    """
    roles = tuple(roles)
    if not any(recipe.is_calibrated(role, target) for role in roles):  # a rule may be about a role that is not there
        return _write(recipe, target, roles, present, open_role, folder, progress, open_tables, {})
    if calibrate is None:
        raise RecipeError(f"recipe {recipe.name}: its method looks at activations; give --calibration DIR")
    scratch = Path(tempfile.mkdtemp(prefix=".calibration-", dir=folder))  # codes are as large as the package
    try:
        found = calibrate.calibrate(recipe, target, open_role, scratch)
        variant, files = _write(recipe, target, roles, present, open_role, folder, progress, open_tables, found)
    finally:
        shutil.rmtree(scratch)
    return replace(variant, calibration=calibrate.record), files


def _write(
    recipe: Recipe,
    target: Target,
    roles: Iterable[str],
    present: Mapping[str, Variant],
    open_role: OpenRole,
    folder: Path,
    progress: Progress | None,
    open_tables: OpenTables,
    calibrated: Mapping[str, FoundRole],
) -> tuple[Variant, dict[str, FileEntry]]:
    """Writes what is new, the roles in `calibrated` as calibration found them.

    Equal precision labels mean equal content, so such graphs are shared; and a head that is tied to the table of the
    embedding is read from there where both are stored alike; `open_tables` gives the table where it is in a graph that
    is there already. Names of the new files begin with "onnx/".
    """
    graphs: dict[str, GraphFile] = {}
    files: dict[str, FileEntry] = {}
    labels = {role: precision_label(recipe, role, target) for role in roles}
    for role, label in labels.items():
        alike = (variant.graphs[role] for variant in present.values() if variant.graphs[role].precision == label)
        if (found := next(alike, None)) is not None:
            graphs[role] = found
    missing = [role for role in labels if role not in graphs]
    known: dict[Content, Place] = {}
    if _TABLES in graphs and missing and (opened := open_tables(graphs[_TABLES])) is not None:
        known = _places(graphs[_TABLES], *opened, recipe, target)
    for role in sorted(missing, key=lambda role: role != _TABLES):  # what it has, others need not store
        stem = file_stem(role, labels[role])
        model, source = open_role(role)
        of_role = calibrated.get(role)
        if of_role is not None:
            source = of_role.apply(model, source)
        stored, source = balance(model, rewrite(model, role, recipe, target), source)
        codes = {} if of_role is None else of_role.codes
        if recipe.cache is not None and of_role is not None and of_role.cache:
            quantize_cache(model, of_role.cache, recipe.cache, target)
        written = write_graph(model, stored, source, folder, stem, _named(progress, stem), known=known, found=codes)
        graphs[role] = written.graph_file(labels[role])
        files |= {f"onnx/{name}": entry for name, entry in written.files.items()}
        if role == _TABLES:
            known = _places(graphs[role], model.graph, source, recipe, target)
    return Variant(recipe.name, to_json(recipe), {role: graphs[role] for role in labels}), files


def _places(
    entry: GraphFile, graph: ir.Graph, source: WeightSource, recipe: Recipe, target: Target
) -> dict[Content, Place]:
    """What others need not store."""
    formats = {parameter: recipe.format_of(_TABLES, parameter, target) for parameter in entry.formats}
    return places(graph, formats, source)


def _named(progress: Progress | None, stem: str) -> Progress | None:
    """The same progress, telling the file beside the parameter."""
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{stem} {what}")
