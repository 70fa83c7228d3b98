"""Golden folders of packages without a decoder: what a variant makes of the images that upstream's code encoded.

Golden rows are padded to the longest, as upstream packs them; a variant has its images in one sequence, in one call.
What it computed is laid out in rows for the comparison alone, so a row that leaked into another would show.

Dims: I images, N patches of all images, R rows, S patches of the longest row, D width, C classes.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.encode import EncodeOptions, next_fit, prepare_images
from ..runtime.errors import InputError, VlmportError
from ..runtime.image import Patches
from ..runtime.model import Model
from ..runtime.token_drop import keep_patches
from .candidate import Key
from .compare import Comparison, NotCompared, compare_ids, compare_logits, compare_tensors
from .golden import Case, Golden, StageEntry, input_path
from .golden_compare import compare_hash
from .image_stages import ImageStages, run_images

__all__ = ["compare_image_golden"]

Array = NDArray[Any]
Record = Comparison | NotCompared
_KINDS = {"pixel_values": "pixels", "hidden": "vision", "pooled": "projector"}
_OPTIONS = ("group_images", "group_max_seq_len", "token_dropout", "keep_indices")
_GROUP_MAX = 2048  # upstream's default of group_max_seq_len


def compare_image_golden(golden: Golden, model: Model) -> list[Record]:
    """All records of one golden folder."""
    records: list[Record] = []
    for name, case in golden.cases.items():
        try:
            rows, patches = _request(golden, case, model)
        except VlmportError as error:
            records.append(Comparison(name, "request", "exact", num_values=1, num_different=1, note=str(error)))
            continue
        if _is_drawn(case):
            records.append(NotCompared(name, "all", "patches were dropped by upstream's own random numbers"))
            continue
        records += _compare_rows(name, case, rows, patches)
        stages = _row_stages(rows, patches, run_images(model, patches))
        for entry in case.stages:
            records.append(_compare_entry(name, entry, golden.tensors[entry.tensor], stages.get(entry.stage)))
        whole = {stage: array for stage, array in stages.items() if stage != "hidden"}  # its padding means nothing
        known: Mapping[Key, Array] = {(stage, None, None): array for stage, array in whole.items()}
        for hashed in case.hashes.values():
            records += compare_hash(name, hashed, case.stages, known)
    records += [NotCompared(name, "all", "a batch of prompts, which this package takes not") for name in golden.batches]
    records += [NotCompared(name, "all", "no rule of the runtime goes by this name") for name in golden.alternatives]
    return records


def _request(golden: Golden, case: Case, model: Model) -> tuple[list[int], list[Patches]]:
    """Number of images of each row, and the images of all rows. Raises InputError for what cannot be asked."""
    rows, options = case.request.get("rows"), case.request.get("options", {})
    where = golden.path / "expected.json"
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows) or not rows:
        raise InputError(f"{where}: the request has no rows of images")
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise InputError(f"{where}: option {unknown[0]!r} is unknown; known are {', '.join(_OPTIONS)}")
    files = [Path(input_path(golden.path, name)) for row in rows for name in row]
    patches, _ = prepare_images(model.manifest.image, files, EncodeOptions())
    kept = options.get("keep_indices")
    if kept is not None:
        if not isinstance(kept, list) or len(kept) != len(patches):
            raise InputError(f"{where}: keep_indices has not one list for each of {len(patches)} images")
        named = zip(patches, kept, files, strict=True)
        patches = [keep_patches(item, indices, file.name) for item, indices, file in named]
    return [len(row) for row in rows], patches


def _is_drawn(case: Case) -> bool:
    options = case.request.get("options", {})
    return bool(options.get("token_dropout")) and "keep_indices" not in options


def _compare_rows(name: str, case: Case, rows: Sequence[int], patches: Sequence[Patches]) -> list[Record]:
    """The rows into which the runtime groups the images, where upstream grouped them."""
    options = case.request.get("options", {})
    if not options.get("group_images"):
        return []
    groups = next_fit([len(item.pixel_values) for item in patches], options.get("group_max_seq_len", _GROUP_MAX))
    return [compare_ids(name, "rows", np.array(rows), np.array([len(group) for group in groups]))]


def _row_stages(rows: Sequence[int], patches: Sequence[Patches], stages: ImageStages) -> dict[str, Array]:
    """The stages as upstream lays them out: [R, S, ...] with zeros behind the last patch of a row, and [I, ...]."""
    sizes = [len(item.pixel_values) for item in patches]
    ids = [np.repeat(np.arange(count), part) for count, part in zip(rows, _split(sizes, rows), strict=True)]
    longest, num_queries = max(map(len, ids)), max(rows)
    ids_RS = np.stack([np.pad(own, (0, longest - len(own)), constant_values=-1) for own in ids])
    real_RS = ids_RS >= 0
    queries_RQ1 = np.arange(num_queries)[None, :, None]

    def padded(flat: Array) -> Array:
        array = np.zeros((*ids_RS.shape, flat.shape[-1]), flat.dtype)
        array[real_RS] = flat
        return array

    found = {
        "pixel_values": padded(np.concatenate([item.pixel_values for item in patches])),
        "attn_mask": ((ids_RS[:, :, None] == ids_RS[:, None, :]) & real_RS[:, None, :]).astype(np.uint8),
        "pool_mask": (queries_RQ1 == ids_RS[:, None, :]).astype(np.uint8),
        "hidden": padded(stages.vision),
        "pooled": stages.pooled,
    }
    return found if stages.logits is None else found | {"logits": stages.logits}


def _split(sizes: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
    bounds = np.cumsum([0, *rows])
    return [list(sizes[start:stop]) for start, stop in pairwise(bounds)]


def _compare_entry(name: str, entry: StageEntry, reference: Array, candidate: Array | None) -> Record:
    if candidate is None:
        return NotCompared(name, entry.stage, "the package's graphs and runtime do not give it")
    if entry.part is not None:
        candidate = candidate[(slice(None),) * entry.part.axis + (slice(entry.part.start, entry.part.stop),)]
    if entry.valid is not None and candidate.shape == reference.shape:
        reference, candidate = (_real(entry, array) for array in (reference, candidate))
    if np.issubdtype(reference.dtype, np.integer):
        return compare_ids(name, entry.stage, reference, candidate)
    if entry.stage == "logits":
        return compare_logits(name, entry.stage, "classes", reference, candidate)
    return compare_tensors(name, entry.stage, _KINDS.get(entry.stage, "vision"), reference, candidate)


def _real(entry: StageEntry, array: Array) -> Array:
    """What of the rows is not padding, one row after the other."""
    valid = entry.valid
    assert valid is not None
    axis = valid.axis - (valid.axis > valid.row_axis)
    spans = zip(np.moveaxis(array, valid.row_axis, 0), valid.start, valid.stop, strict=True)
    return np.concatenate([np.moveaxis(row, axis, 0)[start:stop] for row, start, stop in spans])
