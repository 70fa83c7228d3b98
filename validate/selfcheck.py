"""The self-check of a package: one drawn picture and a question, and what each variant made of them where it was built.

    parity/golden/selfcheck.json      the request, and for each variant the graphs and the arrays that belong together
    parity/golden/picture.png         what the question is about
    parity/golden/<variant>.npz       stages of that variant

`verify` runs it on another box with nothing but the runtime. It asks whether this box computes what the box of the
export did, not whether that was right: parity/report.json is about that. Kernels differ between boxes, so limits are
wider than float32 noise for low precisions, where a rounded activation can go the other way.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..runtime.encode import EncodeOptions, prepare_images
from ..runtime.errors import PackageError
from ..runtime.generate import GenerationOptions, Timings
from ..runtime.model import Model, VisionOutput
from ..runtime.package import Package, file_entry, only_writer
from ..runtime.prepare import Prepared
from ..runtime.sample import SamplingParams
from ..runtime.schema import SchemaError, from_json, to_json
from .compare import Comparison, StageRow, compare_ids, compare_logits, compare_tensors, stage_rows
from .gates import Gate, GateTable
from .image_stages import run_images
from .samples import draw_picture
from .stages import run_stages

__all__ = ["SELFCHECK_GATES", "SELFCHECK_SCHEMA", "check_selfcheck", "write_selfcheck"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]
SELFCHECK_SCHEMA = "vlmport-selfcheck/1"
_FILE, _PICTURE = "selfcheck.json", "picture.png"
_FOLDER = ("parity", "golden")
_NUM_TOKENS = 8
_WHOLE_BYTES = 512 << 20  # variants up to this size are run as users run them, larger ones in pieces
_KINDS = {"pixel_values": "pixels", "vision": "vision", "projector": "projector", "inputs_embeds": "embeddings"}
_LOGITS = {"step_logits": "decode", "classes": "classes"}

_FLOAT32 = (Gate("num_nonfinite", 0, "never right"), Gate("relative_l2", 1e-3, "other kernels, float32"))
_LOW = (Gate("num_nonfinite", 0, "never right"), Gate("relative_l2", 0.05, "other kernels, rounded activations"))
_LOGITS_FLOAT32 = (*_FLOAT32, Gate("same_top1", 1.0, "equal off ties"))
_LOGITS_LOW = (*_LOW, Gate("kl_mean", 1e-3, "as int8 against its reference"))


def _column(tensors: tuple[Gate, ...], logits: tuple[Gate, ...]) -> Mapping[str, tuple[Gate, ...]]:
    exact = (Gate("num_different", 0, "prompts, grids and positions are integer work"),)
    pixels = (Gate("max_abs", 0.0, "Pillow and numpy: the same to the bit"),)
    towers = dict.fromkeys(("vision", "projector", "embeddings"), tensors)
    return {"exact": exact, "pixels": pixels, **towers, "decode": logits, "classes": logits}


# The same box or another: not a measure of fidelity, so it has a table of its own with the columns that matter here.
SELFCHECK_GATES = GateTable(
    gates={
        "fp32": _column(_FLOAT32, _LOGITS_FLOAT32),
        "int8": _column(_LOW, _LOGITS_LOW),
    },
    tie_margin={"fp32": 8e-3, "int8": 0.09},
    origin="self-check",
)


@dataclass(frozen=True)
class _Stored:
    """A variant's part: the arrays, and the graphs that made them by sha256."""

    arrays: str  # file name
    sha256: str  # of that file
    graphs: dict[str, str]  # file in onnx/ -> sha256
    forced_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Document:
    schema: str
    messages: tuple[dict[str, Any], ...]
    picture_sha256: str | None
    variants: dict[str, _Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SELFCHECK_SCHEMA:
            raise ValueError(f"schema {self.schema!r} is not {SELFCHECK_SCHEMA!r}")


def write_selfcheck(path: Path, progress: Progress | None = None) -> None:
    """Runs each variant of a package once and keeps what it computed.

    What an older self-check holds of variants that are still the same stays: it may come from another box.
    """
    folder = path.joinpath(*_FOLDER)
    fresh = folder.with_name(f".{folder.name}.partial")
    Package.open(path)  # before anything in the folder is touched
    with only_writer(path, wait=True):  # one that adds a variant meanwhile has it in the manifest by then
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            _write(Package.open(path), folder, fresh, progress)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    if progress is not None:
        progress(1, 1, "self-check")


def _write(package: Package, folder: Path, fresh: Path, progress: Progress | None) -> None:
    """Writes the self-check into `fresh`; `folder` is the older one's place."""
    messages = _request(package, fresh)
    picture = fresh / _PICTURE
    picture_sha256 = file_entry(picture).sha256 if picture.is_file() else None
    kept = _still_true(package, folder, _Document(SELFCHECK_SCHEMA, messages, picture_sha256))
    variants: dict[str, _Stored] = {}
    for number, name in enumerate(package.manifest.variants):
        if progress is not None:
            progress(number, len(package.manifest.variants), f"self-check, {name}")
        arrays_file = fresh / f"{name}.npz"
        if name in kept:
            shutil.copyfile(folder / kept[name].arrays, arrays_file)
            variants[name] = kept[name]
            continue
        arrays, ids = _record(package, name, messages, fresh)
        np.savez(arrays_file, allow_pickle=False, **arrays)
        variants[name] = _Stored(arrays_file.name, file_entry(arrays_file).sha256, _graphs(package, name), ids)
    document = _Document(SELFCHECK_SCHEMA, messages, picture_sha256, variants)
    (fresh / _FILE).write_text(json.dumps(to_json(document), indent=2) + "\n", encoding="utf-8")


def check_selfcheck(
    package: Package, variant: str | None = None, progress: Progress | None = None
) -> dict[str, tuple[StageRow, ...]]:
    """Runs the self-check on this box: rows by variant (all of them, or the one named).

    Raises PackageError when there is none, or when it belongs to other bytes than the package's.
    """
    folder = package.path.joinpath(*_FOLDER)
    document = _read(folder)
    names = list(package.manifest.variants) if variant is None else [package.variant(variant).name]
    results: dict[str, tuple[StageRow, ...]] = {}
    for number, name in enumerate(names):
        if progress is not None:
            progress(number, len(names), f"self-check, {name}")
        results[name] = _check_variant(package, name, folder, document)
    if progress is not None:
        progress(1, 1, "self-check")
    return results


def _request(package: Package, folder: Path) -> tuple[dict[str, Any], ...]:
    """The question, about a picture in `folder` where the package can see; the picture alone where it cannot answer."""
    answers = "decoder" in package.manifest.roles
    content: list[dict[str, Any]] = [{"type": "text", "text": "Describe the picture."}] if answers else []
    if package.manifest.image is not None:
        draw_picture(20, 112, 84).save(folder / _PICTURE)
        content.insert(0, {"type": "image", "image": _PICTURE})
    return ({"role": "user", "content": content},)


def _still_true(package: Package, folder: Path, asked: _Document) -> dict[str, _Stored]:
    """Variants of an older self-check that asked the same of the same graphs, and whose arrays are whole."""
    try:
        older = _read(folder)
    except PackageError:  # none, or a damaged one
        return {}
    if (older.messages, older.picture_sha256) != (asked.messages, asked.picture_sha256):
        return {}
    return {
        name: stored
        for name, stored in older.variants.items()
        if name in package.manifest.variants
        and stored.arrays == f"{name}.npz"
        and stored.graphs == _graphs(package, name)
        and (folder / stored.arrays).is_file()
        and file_entry(folder / stored.arrays).sha256 == stored.sha256
    }


def _check_variant(package: Package, name: str, folder: Path, document: _Document) -> tuple[StageRow, ...]:
    stored = document.variants.get(name)
    if stored is None or stored.graphs != _graphs(package, name):
        raise PackageError(f"{folder / _FILE}: says nothing of variant {name!r} as it is now; {_AGAIN}")
    if Path(stored.arrays).name != stored.arrays or not (folder / stored.arrays).is_file():
        raise PackageError(f"{folder / stored.arrays}: missing; {_AGAIN}")
    if file_entry(folder / stored.arrays).sha256 != stored.sha256:
        raise PackageError(
            f"{folder / stored.arrays}: content differs from its sha256 in {_FILE}; copy the package again"
        )
    try:
        with np.load(folder / stored.arrays, allow_pickle=False) as file:
            expected = {key: file[key] for key in file.files}
    except (ValueError, BadZipFile) as error:
        raise PackageError(f"{folder / stored.arrays}: not an .npz file of plain arrays: {error}") from error
    found, _ = _compute(package, name, document.messages, folder, stored.forced_ids)
    records = [_compare(name, stage, array, found.get(stage, np.zeros(0))) for stage, array in expected.items()]
    low = any(not graph.precision.startswith("fp32") for graph in package.variant(name).graphs.values())
    columns = dict.fromkeys(("exact", *_KINDS.values(), *_LOGITS.values()), "int8" if low else "fp32")
    return stage_rows(records, SELFCHECK_GATES, columns)


def _record(
    package: Package, name: str, messages: tuple[dict[str, Any], ...], folder: Path
) -> tuple[dict[str, Array], tuple[int, ...]]:
    """What a variant computes where it is built, and the ids that it was given after the prompt.

    The box of an export may be too small to load what it has written, so large variants run a piece at a time: with
    ids from the prompt in place of their own answer, as each step would load every weight again.
    """
    if package.size(name) <= _WHOLE_BYTES or package.manifest.target != "cpu":
        return _compute(package, name, messages, folder, None)
    from .pieces import PiecedModel, logits_in_pieces  # needs onnx, which `verify` does not

    with PiecedModel(package, name) as model:
        if "decoder" not in model.manifest.roles:
            return _compute_images(model, folder), ()
        prepared = model.prepare(messages, folder=folder)
        ids = tuple(prepared.input_ids[-_NUM_TOKENS:].tolist())
        visual = model.features(prepared)
        embeds = model.embed(prepared, None if visual is None else visual.features)
        logits = logits_in_pieces(model, prepared, embeds, ids)
    return _arrays(prepared, visual, embeds, logits), ids


def _compute(
    package: Package,
    name: str,
    messages: tuple[dict[str, Any], ...],
    folder: Path,
    forced_ids: tuple[int, ...] | None,
) -> tuple[dict[str, Array], tuple[int, ...]]:
    """Stages of one variant, and the greedy ids of this run (or the given ones)."""
    with Model.load(package.path, name) as model:
        if "decoder" not in model.manifest.roles:
            return _compute_images(model, folder), ()
        prepared = model.prepare(messages, folder=folder)
        ids = forced_ids
        if ids is None:
            options = GenerationOptions(_NUM_TOKENS, SamplingParams(temperature=0.0), ignore_eos=True)
            ids = model.stream_prepared(prepared, options).finish().token_ids
        stages = run_stages(model, prepared, ids)
    visual = None
    if stages.features is not None:
        visual = VisionOutput(stages.vision, stages.features, Timings())
    return _arrays(prepared, visual, stages.inputs_embeds, stages.step_logits), ids


def _arrays(prepared: Prepared, visual: VisionOutput | None, embeds: Array, logits: Array) -> dict[str, Array]:
    arrays = {
        "input_ids": prepared.input_ids,
        "position_ids": prepared.position_ids,
        "inputs_embeds": embeds,
        "step_logits": logits,
    }
    if visual is not None:
        arrays["pixel_values"] = np.concatenate([patches.pixel_values for patches in prepared.visuals])
        arrays |= {"projector": visual.features} | ({} if visual.vision is None else {"vision": visual.vision})
    return arrays


def _compute_images(model: Model, folder: Path) -> dict[str, Array]:
    """Stages of the picture, packed with itself."""
    patches, _ = prepare_images(model.manifest.image, [folder / _PICTURE] * 2, EncodeOptions())
    stages = run_images(model, patches)
    arrays = {"pixel_values": np.concatenate([item.pixel_values for item in patches])}
    arrays |= {"vision": stages.vision, "projector": stages.pooled}
    return arrays if stages.logits is None else arrays | {"classes": stages.logits}


def _compare(name: str, stage: str, expected: Array, found: Array) -> Comparison:
    if np.issubdtype(expected.dtype, np.integer):
        return compare_ids(name, stage, expected, found)
    if stage in _LOGITS:
        return compare_logits(name, stage, _LOGITS[stage], expected, found)
    return compare_tensors(name, stage, _KINDS[stage], expected, found)


def _graphs(package: Package, name: str) -> dict[str, str]:
    graphs = package.variant(name).graphs.values()
    files = sorted({file for graph in graphs for file in graph.files})
    return {file: package.manifest.files[f"onnx/{file}"].sha256 for file in files}


_AGAIN = "write it again with `vlmport export` or `vlmport quantize`"


def _read(folder: Path) -> _Document:
    file = folder / _FILE
    if not file.is_file():
        raise PackageError(f"{file}: missing, so there is nothing to check this box with; {_AGAIN}")
    try:
        document = from_json(_Document, json.loads(file.read_text(encoding="utf-8")))
    except (SchemaError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{file}: {error}") from error
    picture = folder / _PICTURE
    if document.picture_sha256 is not None:
        if not picture.is_file():
            raise PackageError(f"{picture}: missing; copy the package again")
        if file_entry(picture).sha256 != document.picture_sha256:
            raise PackageError(f"{picture}: content differs from its sha256 in {_FILE}; copy the package again")
    return document
