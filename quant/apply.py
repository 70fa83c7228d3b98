"""Adds a variant to a package in place. A reader, or a kill at any moment, finds the old manifest or the new one.

New files are built in a hidden folder of the package, renamed to their places and only then named by the manifest,
which is replaced in one step. What an interrupted run leaves is named by no manifest and is removed by the next run.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ..runtime.disk import sync
from ..runtime.errors import PackageError, RecipeError
from ..runtime.manifest import ROLES, Allocation, GraphFile, Manifest
from ..runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text, only_writer
from ..runtime.schema import to_json
from .recipe import TABLE_ROLE, Recipe
from .rewrite import restore_float
from .store import Progress, WeightSource
from .variant import Calibrate, write_variant

__all__ = ["GraphSource", "open_float_graph", "quantize_package"]

_STAGING = ".quantize"
_OWN_FILE = re.compile(rf"({'|'.join(ROLES)})(_[a-z0-9_.-]+)?\.onnx(_data)?")


@dataclasses.dataclass(frozen=True)
class GraphSource:
    """A WeightSource over the stored initializers of a graph. Rows are read from disk when asked for."""

    graph: Path
    tensors: Mapping[str, ir.TensorProtocol]

    def shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensors[parameter].shape.numpy())

    def origin(self, parameter: str) -> Hashable:
        tensor = self.tensors[parameter]
        return (tensor.path, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else (self.graph, parameter)

    def rows(self, parameter: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        tensor, shape = self.tensors[parameter], self.shape(parameter)
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()[start:stop].astype(np.float32)
        # Read, not mapped: pages of a mapped file count as memory of the process for as long as it is open.
        values_a_row = int(np.prod(shape[1:], dtype=np.int64))
        dtype = tensor.dtype.numpy()
        place = (tensor.offset or 0) + start * values_a_row * dtype.itemsize
        rows = np.fromfile(tensor.path, dtype, (stop - start) * values_a_row, offset=place)
        return rows.reshape(stop - start, *shape[1:]).astype(np.float32, copy=False)


def quantize_package(
    path: str | Path,
    recipe: Recipe,
    *,
    graphs: Mapping[str, ir.Model] | None = None,
    sources: Mapping[str, WeightSource] | None = None,
    progress: Progress | None = None,
    calibrate: Calibrate | None = None,
    allocation: Allocation | None = None,
) -> Package:
    """Adds the variant `recipe.name` to the package and gives the package as it is then.

    Float graphs and weights come from `graphs` and `sources` by role, or else from a variant of the package that holds
    the weights as the checkpoint does. Files that another variant has already are shared. `calibrate` is for recipes
    whose methods look at activations; `allocation` tells how the bits of the recipe were chosen. Does nothing where the
    same variant is there already. Raises RecipeError, PackageError, CapacityError.
    """
    Package.open(path)  # before anything in the folder is touched
    with only_writer(Path(path)):
        package = Package.open(path)
        if _is_there(package, recipe, calibrate):
            return package
        staging = _clean_staging(package)
        try:
            manifest = _build(package, recipe, staging, graphs, sources, progress, calibrate, allocation)
            _publish(package.path, staging, manifest)
        finally:
            shutil.rmtree(staging)
    return Package.open(path)


def open_float_graph(package: Package, role: str) -> tuple[ir.Model, GraphSource]:
    """The float graph of a role, its weights without values, and the source of these values.

    Raises RecipeError where no variant stores the weights as the checkpoint does, PackageError where files are damaged.
    """
    entry = _lossless(package, role)
    folder = package.path / "onnx"
    for name in entry.files:
        if file_entry(folder / name).sha256 != package.manifest.files[f"onnx/{name}"].sha256:
            raise PackageError(f"{folder / name}: content differs from its sha256 in {MANIFEST_NAME}; copy it again")
    model = _read_graph(package, entry)
    source = _source(package, entry, model.graph)
    for name in source.tensors:
        model.graph.initializers[name].const_value = None
    restore_float(model)
    return model, source


def _read_graph(package: Package, entry: GraphFile) -> ir.Model:
    """A graph of the package, its external data where the manifest has them."""
    folder = package.path / "onnx"
    try:
        model = ir.load(folder / entry.graph)  # pyright: ignore[reportUnknownMemberType]
    except (DecodeError, ValueError) as error:
        raise PackageError(f"{folder / entry.graph}: not a readable ONNX graph; export the checkpoint again") from error
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_place(folder, entry, name, value.const_value, package.manifest)
    return model


def _source(package: Package, entry: GraphFile, graph: ir.Graph) -> GraphSource:
    """The weights that a float graph holds."""
    floats = {name for name, label in entry.formats.items() if label.startswith("float")}  # the rest stays as it is
    tensors = {name: value.const_value for name, value in graph.initializers.items() if name in floats}
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    lost = sorted(floats - set(found))
    path = package.path / "onnx" / entry.graph
    if lost or not found:
        raise PackageError(f"{path}: weights {lost[:3]} are not in the graph; export the checkpoint again")
    return GraphSource(path, found)


def _is_there(package: Package, recipe: Recipe, calibrate: Calibrate | None) -> bool:
    variant = package.manifest.variants.get(recipe.name)
    if variant is not None and variant.recipe != to_json(recipe):
        raise RecipeError(f"{package.path}: has a variant {recipe.name!r} by other rules; give the recipe another name")
    if variant is not None and calibrate is not None and variant.calibration != calibrate.record:
        raise RecipeError(
            f"{package.path}: has a variant {recipe.name!r} calibrated on other data; give the recipe another name"
        )
    return variant is not None


def _build(
    package: Package,
    recipe: Recipe,
    staging: Path,
    graphs: Mapping[str, ir.Model] | None,
    sources: Mapping[str, WeightSource] | None,
    progress: Progress | None,
    calibrate: Calibrate | None,
    allocation: Allocation | None,
) -> Manifest:
    """Writes the files that are not in the package yet into `staging`; gives the manifest with the new variant."""
    manifest = package.manifest

    def open_role(role: str) -> tuple[ir.Model, WeightSource]:
        if graphs is not None and sources is not None:
            return graphs[role].clone(), sources[role]
        return open_float_graph(package, role)

    def open_tables(stored: GraphFile) -> tuple[ir.Graph, WeightSource] | None:
        if sources is not None:
            return _read_graph(package, stored).graph, sources[TABLE_ROLE]
        entry = _find_lossless(package, TABLE_ROLE)
        if entry is None:
            return None
        # Where weights lie tells which are the same; what they are does not matter here, so no hash is checked.
        return _read_graph(package, stored).graph, _source(package, entry, _read_graph(package, entry).graph)

    variant, files = write_variant(
        recipe,
        manifest.target,
        manifest.roles,
        manifest.variants,
        open_role,
        staging,
        progress,
        open_tables=open_tables,
        calibrate=calibrate,
    )
    variants = manifest.variants | {recipe.name: dataclasses.replace(variant, allocation=allocation)}
    return dataclasses.replace(manifest, variants=variants, files=dict(sorted((manifest.files | files).items())))


def _publish(folder: Path, staging: Path, manifest: Manifest) -> None:
    """Moves the files to their places, then replaces the manifest: the one step that makes them part of the package."""
    for file in sorted(staging.iterdir()):
        file.rename(folder / "onnx" / file.name)
    sync(folder / "onnx")
    new = staging / MANIFEST_NAME
    with new.open("w", encoding="utf-8") as stream:
        stream.write(manifest_text(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(folder / MANIFEST_NAME)
    sync(folder)


def _find_lossless(package: Package, role: str) -> GraphFile | None:
    """A graph of the role that holds the weights as the checkpoint does."""
    kept = ("fp32", "fp16") if package.manifest.source.dtype == "float16" else ("fp32",)
    for precision in kept:
        for variant in package.manifest.variants.values():
            if variant.graphs[role].precision == precision:
                return variant.graphs[role]
    return None


def _lossless(package: Package, role: str) -> GraphFile:
    entry = _find_lossless(package, role)
    if entry is not None:
        return entry
    dtype = package.manifest.source.dtype
    again = ", or export it again with recipe fp32 among the others" if package.manifest.target == "cpu" else ""
    raise RecipeError(
        f"{package.path}: no variant holds the {dtype} weights of {role} unchanged; give --checkpoint{again}"
    )


def _check_place(folder: Path, entry: GraphFile, name: str, tensor: ir.ExternalTensor, manifest: Manifest) -> None:
    """A graph may point at the data files that the manifest names for it and nowhere else."""
    end = (tensor.offset or 0) + tensor.nbytes
    location = str(Path(tensor.location))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    if location not in entry.files[1:] or end > manifest.files[f"onnx/{location}"].size:
        raise PackageError(f"{folder / entry.graph}: {name} lies outside {entry.data}; export the checkpoint again")


def _clean_staging(package: Package) -> Path:
    """An empty staging folder, once what an interrupted run has left is gone: graph files that no manifest names."""
    staging = package.path / _STAGING
    try:
        if staging.exists():
            shutil.rmtree(staging)
        for file in (package.path / "onnx").iterdir():
            if _OWN_FILE.fullmatch(file.name) and f"onnx/{file.name}" not in package.manifest.files:
                file.unlink()
        staging.mkdir()
    except OSError as error:
        raise PackageError(
            f"{error.filename}: cannot be changed ({error.strerror}); make the package writable"
        ) from error
    return staging
