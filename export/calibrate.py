"""Calibration, samples through the modules of a family stage by stage, each stage quantized on the way.

Roles are run in the order in which a request goes through them, each on what the quantized one before it gave.
"""

import json
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..quant.calibrate import quantize_stage
from ..quant.data_file import Progress
from ..quant.folds import find_folds
from ..quant.found import FoundRole
from ..quant.recipe import Recipe, Target
from ..quant.source import WeightSource
from ..runtime.manifest import Calibration
from ..runtime.package import Package
from ..runtime.prompt import PromptBuilder
from .family import ManifestParts, RoleSpec, family_of, roles_of
from .feeds import CalibrationOptions, SampleFeeds
from .shelf import Shelf, Space
from .stages import RoleStages, Stage
from .watch import Watch

__all__ = ["Calibrator", "OpenRole", "package_calibrator", "read_rows"]

OpenRole = Callable[[str], tuple[ir.Model, WeightSource]]


class Calibrator:
    """Calibrates recipes on one folder of samples."""

    def __init__(
        self,
        options: CalibrationOptions,
        roles: Mapping[str, RoleSpec],
        parts: ManifestParts,
        builder: PromptBuilder | None,
        progress: Progress | None = None,
    ) -> None:
        """Reads and checks the samples. Raises InputError naming what is wrong with them."""
        self.roles, self.feeds = roles, SampleFeeds(options, roles, parts, builder)
        self.record: Calibration = self.feeds.record
        self._progress = progress

    def calibrate(self, recipe: Recipe, target: Target, open_role: OpenRole, folder: Path) -> dict[str, FoundRole]:
        """What the calibrated methods of a recipe find, by role; their files go below `folder`."""
        calibrated = [role for role in self.roles if recipe.is_calibrated(role, target)]
        last = max(list(self.roles).index(role) for role in calibrated)
        found: dict[str, FoundRole] = {}
        space = Space(self.feeds.memory)
        known = Shelf(folder / "known", space)
        for sample in range(self.feeds.num_samples):
            known[sample] = self.feeds.start(sample)
        for number, name in enumerate(list(self.roles)[: last + 1]):
            place = folder / name
            place.mkdir(parents=True)
            found[name] = self._role(name, recipe, target, open_role, known, space, place, is_last=number == last)
        known.clear()
        return {role: found[role] for role in calibrated}

    @torch.no_grad()
    def _role(
        self,
        name: str,
        recipe: Recipe,
        target: Target,
        open_role: OpenRole,
        known: MutableMapping[int, dict[str, torch.Tensor]],
        space: Space,
        folder: Path,
        *,
        is_last: bool,
    ) -> FoundRole:
        """Quantizes a role, and adds its outputs to what is known of the samples."""
        model, source = open_role(name)
        spec, found = self.roles[name], FoundRole(folder)
        feeds, carried = Shelf(folder / "feeds", space), Shelf(folder / "carried", space)
        taking, weights = self._feed(name, known, feeds)
        if not taking:
            return found
        with torch.device("meta"):
            module = spec.build().eval()
        run = RoleStages(module, lambda *place: read_rows(model.graph, source, *place), feeds, weights, carried)
        names = {key for key, value in module.named_parameters() if value.dim() == 2}
        formats = {key: format for key in names if (format := recipe.format_of(name, key, target)) is not None}
        folds = find_folds(model.graph)
        watch = Watch(module) if recipe.is_guarded(target) else None
        if watch is not None:
            found.ranges = watch.ranges
            for feed in feeds.values():
                watch.see_inputs(spec.inputs, feed)
        to_the_end = not is_last or any(formats[key].is_calibrated for key in run.outside & formats.keys())
        to_the_end = to_the_end or watch is not None
        total = run.num_stages(to_the_end=to_the_end)
        for number, stage in enumerate(run.stages(to_the_end=to_the_end)):
            self._tell(number, total, f"{recipe.name}: calibrating {name}")
            if watch is not None:
                watch.is_on = False  # what a search tries out is no matter here
            quantize_stage(stage, formats, folds, "float32" if target == "cpu" else "float16", found)
            if recipe.cache is not None and name == "decoder":
                found.cache += cache_ranges(stage)
            if watch is not None:
                watch.is_on = True
        self._tell(total, total, f"{recipe.name}: calibrating {name}")
        if to_the_end:
            for place, number in enumerate(taking):
                values = dict(known[number])
                self.feeds.keep(name, values, run.run(place))
                known[number] = values
        feeds.clear()
        carried.clear()
        return found

    def _feed(
        self, role: str, known: Mapping[int, dict[str, torch.Tensor]], feeds: MutableMapping[int, Any]
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Which samples go through a role, and the weights of their rows; what it is given goes to `feeds`."""
        taking: list[int] = []
        weights: list[torch.Tensor] = []
        for sample in sorted(known):
            values = known[sample]
            if self.feeds.takes(role, values):
                feeds[len(taking)], rows = self.feeds.feed(role, sample, values)
                weights.append(rows)
                taking.append(sample)
        return taking, weights

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._progress is not None:
            self._progress(done, total, f"{what}, stage {min(done + 1, total)} of {total}")


def package_calibrator(package: Package, options: CalibrationOptions, progress: Progress | None = None) -> Calibrator:
    """For a package by its own files: the modules follow from its config.json. Raises as Calibrator does."""
    documents = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in package.path.glob("*.json")}
    config = documents["config.json"]
    family = family_of(config, package.path / "config.json")
    parts = family.manifest(config, documents)
    builder = None if parts.prompt is None else PromptBuilder.from_package(package.path, package.manifest)
    return Calibrator(options, roles_of(family, config, documents), parts, builder, progress)


def cache_ranges(stage: Stage) -> list[tuple[np.ndarray, np.ndarray]]:
    """The largest absolute value of each channel [G, E] of the keys and the values that a layer gives to the cache."""
    largest: list[torch.Tensor] = []
    for sample in range(stage.num_samples):
        written = [values.abs().amax((0, 2)) for values in stage.results(sample)[1:] if values.dim() == 4]
        largest = [torch.maximum(*pair) for pair in zip(largest, written, strict=True)] if largest else written
    arrays = [values.numpy() for values in largest]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def read_rows(graph: ir.Graph, source: WeightSource, parameter: str, start: int, stop: int) -> np.ndarray:
    """Rows of a parameter: a stored graph has vectors as constants, a traced one has all of them in the source."""
    value = graph.initializers[parameter]
    if value.const_value is not None:
        return value.const_value.numpy()[start:stop].astype(np.float32)
    return source.rows(parameter, start, stop)
