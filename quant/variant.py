"""Writing the graphs of one variant: shared by export and a later `quantize`, so that their bytes are equal."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from ..runtime.errors import RecipeError
from ..runtime.manifest import Calibration, FileEntry, GraphFile, Variant
from ..runtime.schema import SchemaError, from_json, to_json
from .balance import balance
from .found import Factors, FoundRole
from .guard import Guard
from .kv_cache import quantize_cache
from .recipe import TABLE_ROLE, Recipe, Rule, Target, file_stem, precision_label, rules_about
from .rewrite import rewrite
from .store import Content, Place, Progress, WeightSource, places, write_graph

__all__ = ["Calibrate", "OpenRole", "OpenTables", "write_variant"]

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

    Equal precision labels mean equal content, so such graphs are shared; and a head that is tied to the table of the
    embedding is read from there where both are stored alike; `open_tables` gives the table where it is in a graph that
    is there already. Names of the new files begin with "onnx/". `calibrate` is asked where a method of the recipe looks
    at activations. Raises RecipeError where it is missing.
    """
    roles = tuple(roles)
    is_calibrated = any(recipe.is_calibrated(role, target) for role in roles)  # a rule may be about a role not there
    if is_calibrated and calibrate is None:
        raise RecipeError(f"recipe {recipe.name}: its method or cache looks at activations; give --calibration DIR")
    writer = _Writer(recipe, target, present, open_role, folder, progress)
    labels = {role: precision_label(recipe, role, target) for role in roles}
    for role, label in labels.items():
        writer.share(role, label)
    missing = [role for role in roles if role not in writer.graphs]
    if TABLE_ROLE in missing:  # what it has, others need not store
        missing.remove(TABLE_ROLE)
        writer.write(TABLE_ROLE, labels[TABLE_ROLE])
    elif TABLE_ROLE in writer.graphs and missing and (opened := open_tables(writer.graphs[TABLE_ROLE])) is not None:
        writer.know(*opened)
    with tempfile.TemporaryDirectory(
        prefix=".calibration-", dir=folder
    ) as scratch:  # codes are as large as the package
        calibrated: Mapping[str, FoundRole] = {}
        if calibrate is not None and is_calibrated:
            for role in missing:  # what cannot be is told before data are run
                rewrite(open_role(role)[0], role, recipe, target)
            calibrated = calibrate.calibrate(recipe, target, writer.open, Path(scratch))
        for role in missing:
            writer.write(role, labels[role], calibrated.get(role))
    variant = Variant(recipe.name, to_json(recipe), {role: writer.graphs[role] for role in roles})
    record = calibrate.record if calibrate is not None and is_calibrated else None
    ranges = None if writer.guard is None else writer.guard.record()
    return replace(variant, calibration=record, ranges=ranges), writer.files


class _Writer:
    """Writes the graphs of one variant, role by role."""

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        present: Mapping[str, Variant],
        open_role: OpenRole,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self._recipe, self._open_role, self._folder, self._progress = recipe, open_role, folder, progress
        self._target: Target = target
        self._present = present
        self.guard = None if recipe.range_guard is None or not recipe.is_guarded(target) else Guard(recipe.range_guard)
        self._known: dict[Content, Place] = {}
        self._balanced: dict[str, Factors] = {}
        self.graphs: dict[str, GraphFile] = {}
        self.files: dict[str, FileEntry] = {}

    def share(self, role: str, label: str) -> bool:
        """Takes the graph of a variant that stores the role alike, if there is one.

        Raises RecipeError where a label meant something else when that variant was made: builtin rules change.
        """
        alike = (variant for variant in self._present.values() if variant.graphs[role].precision == label)
        found = next(alike, None)
        if found is None:
            return False
        wanted = rules_about(self._recipe.rules, role, self._target)
        if rules_about(_rules_of(found), role, self._target) != wanted:
            raise RecipeError(
                f"recipe {self._recipe.name}: variant {found.name!r} has {role} in {label} by the rules of another "
                "version; export the checkpoint again"
            )
        self.graphs[role] = found.graphs[role]
        return True

    def know(self, graph: ir.Graph, source: WeightSource) -> None:
        """Takes note of what the tables' graph stores."""
        parameters = self.graphs[TABLE_ROLE].formats
        formats = {parameter: self._recipe.format_of(TABLE_ROLE, parameter, self._target) for parameter in parameters}
        self._known = places(graph, formats, source)

    def open(self, role: str) -> tuple[ir.Model, WeightSource]:
        """A float graph of a role, balanced, and its weights."""
        model, source = self._open_role(role)
        if role not in self._balanced:
            tied = {(content.origin, content.format) for content in self._known}
            if self._progress is not None and any(rule.format.balance for rule in self._recipe.rules):
                self._progress(0, 0, f"balancing {role}")
            self._balanced[role] = balance(model.graph, role, self._recipe, self._target, source, tied)
        return model, self._balanced[role].apply(model, source)

    def write(self, role: str, label: str, found: FoundRole | None = None) -> None:
        """Writes a role, as calibration found it."""
        recipe = self._recipe
        model, source = self.open(role)
        if found is not None:
            source = found.apply(model, source)
        single: Collection[str] = ()
        if found is not None and self.guard is not None:
            widened = self.guard.widen(model, role, found.ranges)
            single = widened or ()
            if widened is None:  # so it is as without a guard
                label = precision_label(replace(recipe, range_guard=None), role, self._target)
                if self.share(role, label):
                    return
        stem = file_stem(role, label)
        stored = rewrite(model, role, recipe, self._target, single)
        codes = {} if found is None else found.codes
        if recipe.cache is not None and found is not None and found.cache:
            quantize_cache(model, found.cache, recipe.cache, self._target)
        tell = _named(self._progress, stem)
        written = write_graph(model, stored, source, self._folder, stem, tell, known=self._known, found=codes)
        self.graphs[role] = written.graph_file(label)
        self.files |= {f"onnx/{name}": entry for name, entry in written.files.items()}
        if role == TABLE_ROLE:
            self.know(model.graph, source)


def _rules_of(variant: Variant) -> tuple[Rule, ...]:
    """Those of the recipe that a variant was made by; none where this version cannot read them."""
    try:
        return from_json(tuple[Rule, ...], variant.recipe.get("rules"))
    except SchemaError:
        return ()


def _named(progress: Progress | None, stem: str) -> Progress | None:
    """The same progress, telling the file beside the parameter."""
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{stem} {what}")
