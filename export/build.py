"""From a checkpoint folder to a package folder: float graphs, variants, documents, manifest.

Everything is written to a temporary sibling of the output, synced and renamed: the package is whole or it is not there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir

from ..quant.digest import FileDigests
from ..quant.feasible import check_calibration
from ..quant.recipe import TABLE_ROLE, Recipe
from ..quant.store import Progress
from ..quant.variant import write_variant
from ..runtime.errors import RecipeError
from ..runtime.manifest import SCHEMA, CacheSpec, FileEntry, Manifest, Source, Variant
from ..runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text
from .calibrate import Calibrator
from .checkpoint import Checkpoint
from .documents import collect_documents
from .family import ManifestParts, roles_of
from .feeds import CalibrationOptions, prompt_builder
from .graphs import FloatGraphs, float_graphs
from .lower import COMPUTE_DTYPE, Target
from .output import check_output, whole_folder

__all__ = ["export_checkpoint"]

_VERSIONS = ("vlmport", "torch", "onnx", "onnx-ir", "onnxscript", "numpy")


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    recipes: Sequence[Recipe],
    *,
    target: Target = "cpu",
    overwrite: bool = False,
    calibration: CalibrationOptions | None = None,
    progress: Progress = lambda done, total, what: None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Package:
    """Writes the package of a checkpoint with one variant a recipe, and opens it.

    `overwrite` replaces an existing package, and nothing else. `calibration` is for recipes whose methods look at
    activations. `progress(done_bytes, total_bytes, what)`; 0 bytes
    while tracing. `finish(folder)` may add to the package before it is put in its place; where it raises, nothing is.
    Raises CheckpointError, RecipeError, PackageError (output exists) or CapacityError (disk), leaving the output as it
    was.
    """
    target_folder = Path(output)
    check_output(target_folder, overwrite)
    _check_names(recipes)
    check_calibration(recipes, target, None if calibration is None else calibration.folder)
    # Hashing what is read takes as long as tracing, and goes on beside it.
    with FileDigests(Checkpoint.open(checkpoint).files) as digests:
        _export(checkpoint, target_folder, recipes, target, calibration, digests, progress, finish)
    return Package.open(target_folder)


def _export(
    checkpoint: str | Path,
    output: Path,
    recipes: Sequence[Recipe],
    target: Target,
    calibration: CalibrationOptions | None,
    digests: FileDigests,
    progress: Progress,
    finish: Callable[[Path], None],
) -> None:
    graphs = float_graphs(checkpoint, target, lambda what: progress(0, 0, what))
    parts = graphs.family.manifest(graphs.checkpoint.config, graphs.checkpoint.documents)
    documents = collect_documents(
        graphs.checkpoint,
        with_prompt=parts.prompt is not None,
        template=parts.template,
        prologue=parts.template_prologue,
    )
    with whole_folder(output) as folder:
        for name, content in documents.items():
            (folder / name).write_bytes(content)
        calibrate = None
        if calibration is not None:
            roles = roles_of(graphs.family, graphs.checkpoint.config, graphs.checkpoint.documents)
            calibrate = Calibrator(calibration, roles, parts, prompt_builder(parts, documents), progress)
        variants, written = _write_variants(graphs, target, recipes, folder / "onnx", calibrate, progress)
        files = {name: file_entry(folder / name) for name in documents} | written
        manifest = _manifest(graphs, parts, target, variants, files, digests.entries())
        (folder / MANIFEST_NAME).write_text(manifest_text(manifest), encoding="utf-8")
        finish(folder)


def _check_names(recipes: Sequence[Recipe]) -> None:
    if not recipes:
        raise RecipeError("recipes: none is given; a package has at least one variant")
    for recipe in recipes:
        if any(other.name == recipe.name and other != recipe for other in recipes):
            raise RecipeError(f"recipe {recipe.name}: two of this name have other rules; rename one of them")


def _write_variants(
    graphs: FloatGraphs,
    target: Target,
    recipes: Sequence[Recipe],
    folder: Path,
    calibrate: Calibrator | None,
    progress: Progress,
) -> tuple[dict[str, Variant], dict[str, FileEntry]]:
    """Variants by name, and the files under onnx/."""
    folder.mkdir()
    variants: dict[str, Variant] = {}
    files: dict[str, FileEntry] = {}
    for recipe in recipes:
        variants[recipe.name], new = write_variant(
            recipe,
            target,
            graphs.graphs,
            variants,
            graphs.open_role,
            folder,
            progress,
            open_tables=lambda entry: (ir.load(folder / entry.graph).graph, graphs.sources[TABLE_ROLE]),
            calibrate=calibrate,
        )
        files |= new
    return variants, files


def _manifest(
    graphs: FloatGraphs,
    parts: ManifestParts,
    target: Target,
    variants: dict[str, Variant],
    files: dict[str, FileEntry],
    source_files: dict[str, FileEntry],
) -> Manifest:
    checkpoint = graphs.checkpoint
    cache: CacheSpec | None = parts.cache
    if cache is not None:
        cache = dataclasses.replace(cache, dtype=COMPUTE_DTYPE[target])
    source = Source(
        name=checkpoint.path.resolve().name,
        model_type=str(checkpoint.config.get("model_type", graphs.family.name)),
        dtype=checkpoint.dtype,
        num_parameters=graphs.num_parameters,
        files=source_files,
    )
    return Manifest(
        schema=SCHEMA,
        family=graphs.family.name,
        target=target,
        source=source,
        roles=tuple(graphs.graphs),
        variants=variants,
        versions=_versions(),
        files=dict(sorted(files.items())),
        image=parts.image,
        video=parts.video,
        vision=parts.vision,
        prompt=parts.prompt,
        positions=parts.positions,
        cache=cache,
        generation=parts.generation,
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "unknown"
    return found
