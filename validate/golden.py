"""Golden folders: reading what upstream computed, strictly, and rebuilding the request of each case.

Schema "vlmport-golden/1"; a golden folder is one with an expected.json. Every field is known or refused; tensors must
have the shape and dtype that the JSON says; paths stay inside the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..runtime.errors import InputError
from ..runtime.schema import SchemaError, from_json

__all__ = [
    "GOLDEN_SCHEMA",
    "Alternative",
    "AlternativeCase",
    "Batch",
    "Case",
    "Generating",
    "Golden",
    "HashEntry",
    "Part",
    "StageEntry",
    "Valid",
    "find_goldens",
    "input_path",
    "load_golden",
    "request_messages",
]

Array = NDArray[Any]
GOLDEN_SCHEMA = "vlmport-golden/1"
_FILE = "expected.json"
_DTYPES = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}


@dataclass(frozen=True)
class Part:
    """The tensor is `whole[start:stop]` along `axis`, Python indices."""

    axis: int
    start: int
    stop: int | None


@dataclass(frozen=True)
class Valid:
    """Along `axis`, only start[i]:stop[i] of row i mean something; the rest is padding."""

    row_axis: int
    axis: int
    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class StageEntry:
    """One tensor of one stage. `index` counts images or clips; `modality` where upstream runs the two apart."""

    stage: str
    tensor: str  # key in the tensor file
    shape: tuple[int, ...]
    dtype: Literal["F32", "I64", "U8"]
    part: Part | None
    layout: str
    modality: Literal["image", "video"] | None = None
    index: int | None = None
    valid: Valid | None = None


@dataclass(frozen=True)
class HashEntry:
    """A whole stage by the sha256 of its row-major bytes, by statistics, or both."""

    stage: str
    shape: tuple[int, ...]
    sha256_f32: str | None = None
    sha256_u8: str | None = None
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    modality: Literal["image", "video"] | None = None
    index: int | None = None


@dataclass(frozen=True)
class Generating:
    """How generated_ids came about."""

    max_new_tokens: int
    do_sample: bool
    ignore_eos: bool
    repetition_penalty: float


@dataclass(frozen=True)
class Case:
    request: dict[str, Any]
    min_margin: float
    stages: tuple[StageEntry, ...]
    hashes: dict[str, HashEntry]
    upstream_fields: Any
    input_ids: tuple[int, ...] | None = None
    generation: Generating | None = None
    generated_ids: tuple[int, ...] | None = None
    note: str | None = None
    prefill_argmax: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """Cases that upstream ran as one padded batch; its tensors have a row axis."""

    rows: tuple[str, ...]
    padding_side: Literal["left", "right"]
    pad_token_id: int
    input_ids: tuple[tuple[int, ...], ...]
    attention_mask: tuple[tuple[int, ...], ...]
    generation: Generating
    generated_ids: tuple[tuple[int, ...], ...]
    min_margin: float
    stages: tuple[StageEntry, ...]
    upstream_fields: Any
    hashes: dict[str, HashEntry] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class AlternativeCase:
    generation: Generating
    generated_ids: tuple[int, ...]
    min_margin: float | None = None
    stages: tuple[StageEntry, ...] = ()
    upstream_fields: Any = None


@dataclass(frozen=True)
class Alternative:
    """The same requests under another rule; its name says which."""

    about: str
    cases: dict[str, AlternativeCase]
    tensors: str | None = None  # another tensor file


@dataclass(frozen=True)
class _Document:
    schema: str
    family: str
    upstream: str
    seed: int
    dtype: Literal["float32"]
    attention: str
    versions: dict[str, str]
    cases: dict[str, Case]
    batches: dict[str, Batch]
    upstream_fields: Any
    special_token_ids: dict[str, int] | None = None
    alternatives: dict[str, Alternative] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != GOLDEN_SCHEMA:
            raise ValueError(f"schema {self.schema!r} is not {GOLDEN_SCHEMA!r}")


@dataclass(frozen=True)
class Golden:
    """A golden folder, read and checked. Tensor keys are unique over its files."""

    path: Path
    upstream: str
    versions: Mapping[str, str]
    cases: Mapping[str, Case]
    batches: Mapping[str, Batch]
    alternatives: Mapping[str, Alternative]
    tensors: Mapping[str, Array]


def find_goldens(root: Path) -> tuple[Path, ...]:
    """The golden folders at or below `root`, sorted. Raises InputError when there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; --golden takes a golden folder or a folder of them")
    found = tuple(sorted(file.parent for file in root.rglob(_FILE)))
    if not found:
        raise InputError(f"{root}: no golden folder here, none has an {_FILE}")
    return found


def load_golden(folder: Path) -> Golden:
    """Reads expected.json and its tensors. Raises InputError naming file, field, value."""
    file = folder / _FILE
    try:
        document = from_json(_Document, json.loads(file.read_text(encoding="utf-8")))
    except (SchemaError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: {error}") from error
    tensors = _read_tensors(folder, "expected.safetensors")
    for name, alternative in document.alternatives.items():
        if alternative.tensors is not None:
            more = _read_tensors(folder, alternative.tensors)
            if clash := [key for key in set(more) & set(tensors) if not np.array_equal(more[key], tensors[key])]:
                raise InputError(
                    f"{folder / alternative.tensors}: tensor {clash[0]!r} of {name} is also in another file"
                )
            tensors |= more
    golden = Golden(
        path=folder,
        upstream=document.upstream,
        versions=document.versions,
        cases=document.cases,
        batches=document.batches,
        alternatives=document.alternatives,
        tensors=tensors,
    )
    _check(golden)
    return golden


def request_messages(golden: Golden, case: Case) -> list[dict[str, Any]] | None:
    """The chat messages of a case with paths made whole; None for a request that is no conversation.

    Raises InputError for a path that leaves the folder's inputs/.
    """
    messages = case.request.get("messages")
    return None if messages is None else [_rebuild_message(golden.path, message) for message in messages]


def _rebuild_message(folder: Path, message: Any) -> dict[str, Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InputError(f"{folder / _FILE}: message {str(message)[:60]!r} has no list of parts as its content")
    return {**message, "content": [_rebuild_part(folder, part) for part in content]}


def _rebuild_part(folder: Path, part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "image":
        return {**part, "image": input_path(folder, part.get("image"))}
    if part.get("type") == "video":
        video = part.get("video")
        frames = isinstance(video, list)
        return {
            **part,
            "video": [input_path(folder, frame) for frame in video] if frames else input_path(folder, video),
        }
    return part


def input_path(folder: Path, name: Any) -> str:
    """The whole path of an input. Raises InputError for one that is not below the folder's inputs/."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if len(parts) < 2 or parts[0] != "inputs" or ".." in parts:
        raise InputError(f"{folder / _FILE}: {name!r} is not a path below inputs/")
    return str(folder.joinpath(*parts))


def _read_tensors(folder: Path, name: str) -> dict[str, Array]:
    if PurePosixPath(name).name != name:
        raise InputError(f"{folder / _FILE}: tensors {name!r} is not a file name")
    try:
        return load_file(folder / name)
    except FileNotFoundError:
        raise InputError(f"{folder / name}: missing; copy the golden folder again") from None
    except SafetensorError as error:
        raise InputError(f"{folder / name}: not a safetensors file: {error}") from error


def _check(golden: Golden) -> None:
    """Every stage has its tensor, of the recorded shape and dtype; batches and alternatives name cases."""
    records: list[tuple[str, tuple[StageEntry, ...]]] = [(name, case.stages) for name, case in golden.cases.items()]
    for name, batch in golden.batches.items():
        _check_names(golden, name, batch.rows)
        records.append((name, batch.stages))
    for name, alternative in golden.alternatives.items():
        _check_names(golden, name, tuple(alternative.cases))
        records += [(f"{name}.{case_name}", case.stages) for case_name, case in alternative.cases.items()]
    for name, entries in records:
        for entry in entries:
            _check_tensor(golden, name, entry)


def _check_names(golden: Golden, name: str, cases: tuple[str, ...]) -> None:
    if unknown := [case for case in cases if case not in golden.cases]:
        raise InputError(f"{golden.path / _FILE}: {name} names {unknown[0]!r}, which is not a case")


def _check_tensor(golden: Golden, name: str, entry: StageEntry) -> None:
    where = f"{golden.path / _FILE}: {name}: stage {entry.stage}"
    if entry.tensor not in golden.tensors:
        raise InputError(f"{where}: no tensor {entry.tensor!r}")
    array = golden.tensors[entry.tensor]
    if array.shape != entry.shape or array.dtype != _DTYPES[entry.dtype]:
        raise InputError(
            f"{where}: tensor {array.dtype}{list(array.shape)}, JSON says {entry.dtype}{list(entry.shape)}"
        )
