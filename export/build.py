"""From a checkpoint folder to a package folder: float graphs, variants, documents, manifest.

Everything is written to a temporary sibling of the output, synced and renamed: the package is whole or it is not there.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..quant.recipe import Recipe, file_stem, precision_label
from ..quant.rewrite import rewrite
from ..quant.store import WrittenGraph, write_graph
from ..runtime.errors import CheckpointError, PackageError
from ..runtime.manifest import SCHEMA, CacheSpec, FileEntry, Manifest, Source, Variant
from ..runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text
from ..runtime.schema import to_json
from .checkpoint import Checkpoint
from .family import Json
from .graphs import FloatGraphs, float_graphs
from .lower import COMPUTE_DTYPE

__all__ = ["export_checkpoint"]

Progress = Callable[[int, int, str], None]
TEMPLATE = "chat_template.jinja"
_VERSIONS = ("vlmport", "torch", "onnx", "onnx-ir", "onnxscript", "numpy")


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    recipes: Sequence[Recipe],
    *,
    target: str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Package:
    """Writes the package of a checkpoint with one variant a recipe, and opens it.

    `overwrite` replaces an existing package, and nothing else. `progress(done_bytes, total_bytes, what)`; 0 bytes while tracing.
    Raises CheckpointError, RecipeError, PackageError (output exists) or CapacityError (disk), leaving the output as it was.
    """
    target_folder = Path(output)
    _check_output(target_folder, overwrite)
    graphs = float_graphs(checkpoint, target, lambda what: progress(0, 0, what))
    documents = _documents(graphs)
    with _whole_folder(target_folder) as folder:
        for name, content in documents.items():
            (folder / name).write_bytes(content)
        variants, written = _write_variants(graphs, recipes, folder / "onnx", progress)
        files = {name: file_entry(folder / name) for name in documents} | written
        manifest = _manifest(graphs, target, variants, files)
        (folder / MANIFEST_NAME).write_text(manifest_text(manifest), encoding="utf-8")
    return Package.open(target_folder)


def _write_variants(
    graphs: FloatGraphs, recipes: Sequence[Recipe], folder: Path, progress: Progress
) -> tuple[dict[str, Variant], dict[str, FileEntry]]:
    """Variants by name, and the files under onnx/. A graph that two recipes store alike is written once."""
    folder.mkdir()
    done: dict[str, WrittenGraph] = {}
    variants: dict[str, Variant] = {}
    for recipe in recipes:
        files = {}
        for role, graph in graphs.graphs.items():
            label = precision_label(recipe, role)
            stem = file_stem(role, label)
            if stem not in done:
                model = graph.clone()
                stored = rewrite(model, role, recipe)
                report = _labelled(progress, stem)
                done[stem] = write_graph(model, stored, graphs.sources[role], folder, stem, report)
            files[role] = done[stem].graph_file(label)
        variants[recipe.name] = Variant(recipe.name, to_json(recipe), files)
    written = {f"onnx/{name}": entry for graph in done.values() for name, entry in graph.files.items()}
    return variants, written


def _labelled(progress: Progress, stem: str) -> Progress:
    return lambda done, total, what: progress(done, total, f"{stem} {what}")


def _manifest(
    graphs: FloatGraphs, target: str, variants: dict[str, Variant], files: dict[str, FileEntry]
) -> Manifest:
    checkpoint, family = graphs.checkpoint, graphs.family
    parts = family.manifest(checkpoint.config, checkpoint.documents)
    cache: CacheSpec | None = parts.cache
    if cache is not None:
        cache = dataclasses.replace(cache, dtype=COMPUTE_DTYPE[target])
    source = Source(
        name=checkpoint.path.resolve().name,
        model_type=str(checkpoint.config.get("model_type")),
        dtype=checkpoint.dtype,
        num_parameters=graphs.num_parameters,
        files={file.name: file_entry(file) for file in checkpoint.files},
    )
    fields = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts)} | {"cache": cache}
    return Manifest(
        schema=SCHEMA,
        family=family.name,
        target=target,
        source=source,
        roles=tuple(graphs.graphs),
        variants=variants,
        versions=_versions(),
        files=dict(sorted(files.items())),
        **fields,
    )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "unknown"
    return found


# Documents: the checkpoint's own files that go along


def _documents(graphs: FloatGraphs) -> dict[str, bytes]:
    checkpoint, family = graphs.checkpoint, graphs.family
    found = {name: checkpoint.path / name for name in family.documents if (checkpoint.path / name).is_file()}
    documents = {name: path.read_bytes() for name, path in found.items()}
    if family.manifest(checkpoint.config, checkpoint.documents).prompt is not None:
        if "tokenizer.json" not in documents:
            raise CheckpointError(
                f"{checkpoint.path}: has no tokenizer.json; save the tokenizer again with transformers (fast tokenizer)"
            )
        documents[TEMPLATE] = _chat_template(checkpoint).encode()
    return documents


def _chat_template(checkpoint: Checkpoint) -> str:
    """The template, from whichever of the three places this checkpoint keeps it in; the processor's own goes first."""
    file = checkpoint.path / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = checkpoint.documents.get(name, {}).get("chat_template")
        if isinstance(template, str):
            return template
    raise CheckpointError(f"{checkpoint.path}: has no chat template ({TEMPLATE}, chat_template.json or tokenizer_config.json)")


# The output folder: whole or not there


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if overwrite and (folder / MANIFEST_NAME).is_file() and not folder.is_symlink():
        return
    if (folder / MANIFEST_NAME).is_file():
        raise PackageError(f"{folder}: exists already; pass --overwrite to replace it, or another -o")
    raise PackageError(f"{folder}: exists and is not a package; choose another -o")


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well, and vanishes when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=_partial_prefix(target) + f"{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise PackageError(f"{target}: cannot be written ({error.strerror}); choose another -o") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folder is its owner's alone
        _sync(folder)
        _put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove_leftovers(target: Path) -> None:
    """Folders of exports that were killed: their process is gone."""
    for folder in target.parent.glob(_partial_prefix(target) + "*"):
        pid = folder.name.removeprefix(_partial_prefix(target)).split("-")[0]
        if not (pid.isdigit() and _is_running(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Flushes every file and directory to the disk: a rename must not outlive its content."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(folder: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=_partial_prefix(target) + f"{os.getpid()}-", dir=target.parent))
        target.rename(old / "replaced")
        folder.rename(target)
        shutil.rmtree(old)
    else:
        folder.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
