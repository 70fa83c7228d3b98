"""Reading a checkpoint folder: config.json, and safetensors read by rows so that no tensor is ever held whole.

Weights are read with plain file reads, not mapped: mapped pages count as resident memory of the process.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from ..runtime.errors import CheckpointError
from .bitsandbytes import Packed, dequantized_rows, fold_packed
from .family import Json, RowBlocks, TensorRef

__all__ = ["Checkpoint", "CheckpointSource", "StoredTensor", "resolve"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Dtype = Literal["float32", "float16", "bfloat16"]
_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: file, byte offset, safetensors dtype, shape; and what of it is meant, or how."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    rows: RowBlocks | None = None  # None: all
    transposed: bool = False  # its columns are the rows that are asked for
    packed: Packed | None = None  # a weight in codes: shape is that of the weight


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its parsed JSON files and the place of every tensor, by name as stored."""

    path: Path
    config: Json
    documents: Mapping[str, Json]  # all JSON files, by file name; also of folders that config.json names
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads the JSON files and the safetensors headers. Raises CheckpointError naming file, problem and fix."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; give the folder of a checkpoint (no hub download is made)"
            )
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json; give the folder of a Hugging Face checkpoint")
        documents = {file.name: _read_json(file) for file in sorted(folder.glob("*.json")) if file.name != INDEX}
        documents |= _named_folders(folder, documents["config.json"])
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            for name, tensor in _read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name} is also in {tensors[name].file.name}; keep one of them"
                    )
                tensors[name] = tensor
        return cls(folder, documents["config.json"], documents, fold_packed(tensors))

    @property
    def dtype(self) -> Dtype:
        """The dtype that holds most of the values: "float32", "float16" or "bfloat16".

        Matrices in several dtypes are "float32", the only one that holds all of them unchanged.
        """
        floats = [tensor for tensor in self.tensors.values() if tensor.packed is None]
        if len({tensor.dtype for tensor in floats if len(tensor.shape) > 1}) > 1:
            return "float32"
        sizes: Counter[str] = Counter()
        for tensor in floats:
            sizes[tensor.dtype] += math.prod(tensor.shape)
        return _DTYPES.get(sizes.most_common(1)[0][0], "float32")

    @property
    def files(self) -> tuple[Path, ...]:
        """config.json and the weight files."""
        return (self.path / "config.json", *sorted({tensor.file for tensor in self.tensors.values()}))


class CheckpointSource:
    """Float32 rows of a role's parameters, read from the checkpoint as they are asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._tensors = tensors  # by parameter name
        self._shapes = shapes  # as the graph has them; the file's may differ behind the first axis

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self._shapes[parameter]

    def origin(self, parameter: str) -> Hashable:
        return self._tensors[parameter]

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop (axis 0) as C-contiguous float32 [stop - start, ...]."""
        tensor = self._tensors[parameter]
        if tensor.packed is not None and tensor.rows is None and not tensor.transposed:
            return dequantized_rows(tensor, start, stop)
        if tensor.transposed:
            return self._columns(parameter, start, stop)
        row = math.prod(self._shapes[parameter][1:]) * _ITEM_SIZES[tensor.dtype]
        with tensor.file.open("rb", buffering=0) as stream:
            pieces = [
                os.pread(stream.fileno(), row * count, tensor.offset + row * first)
                for first, count in _stretches(tensor.rows, start, stop)
            ]
        raw = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(raw) != row * (stop - start):
            raise CheckpointError(
                f"{tensor.file}: ends inside {parameter}; the file changed or is damaged, copy it again"
            )
        return _to_float32(raw, tensor.dtype).reshape(stop - start, *self._shapes[parameter][1:])

    def _columns(self, parameter: str, start: int, stop: int) -> np.ndarray:
        """Columns start to stop of a stored matrix, as rows; read row by row, so that none is held whole."""
        tensor = self._tensors[parameter]
        num_rows, num_columns = tensor.shape
        size = _ITEM_SIZES[tensor.dtype]
        with tensor.file.open("rb", buffering=0) as stream:
            offsets = (tensor.offset + (row * num_columns + start) * size for row in range(num_rows))
            raw = b"".join(os.pread(stream.fileno(), (stop - start) * size, offset) for offset in offsets)
        if len(raw) != num_rows * (stop - start) * size:
            raise CheckpointError(
                f"{tensor.file}: ends inside {parameter}; the file changed or is damaged, copy it again"
            )
        return np.ascontiguousarray(_to_float32(raw, tensor.dtype).reshape(num_rows, stop - start).T)


def resolve(
    checkpoint: Checkpoint,
    wanted: Mapping[str, TensorRef],
    normalise: Callable[[str], str],
    unused: Callable[[str], bool],
) -> dict[str, StoredTensor]:
    """The stored tensor of every wanted one, by the wanted key.

    Raises CheckpointError that lists every missing, unexpected, repeated, mis-shaped or unreadable tensor.
    """
    stored: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in checkpoint.tensors.items():
        if normalise(name) in stored:
            problems.append(f"{name} is there twice, under two spellings of {normalise(name)}")
        stored[normalise(name)] = tensor
    needed = {ref.name: ref for ref in wanted.values()}
    absent = {name: ref for name, ref in needed.items() if name not in stored}
    present = {ref.hint for name, ref in needed.items() if name in stored}
    hints = {ref.hint for ref in absent.values() if ref.hint and ref.hint not in present}
    if hints:
        raise CheckpointError(f"{checkpoint.path}: {'; '.join(sorted(hints))}")
    problems += [f"missing {name} {list(ref.shape)}" for name, ref in absent.items()]
    for name, tensor in stored.items():
        if name not in needed:
            if not unused(name):
                problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != needed[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, config.json implies {list(needed[name].shape)}")
        elif tensor.packed is not None and (needed[name].rows is not None or needed[name].transposed):
            problems.append(f"{name} is quantized, but used in parts")
        elif tensor.packed is None and tensor.dtype not in _DTYPES:
            problems.append(f"{name} is {tensor.dtype}, of {', '.join(_DTYPES)} only")
    if problems:
        raise CheckpointError(f"{checkpoint.path}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
    return {key: replace(stored[ref.name], rows=ref.rows, transposed=ref.transposed) for key, ref in wanted.items()}


def _stretches(rows: RowBlocks | None, start: int, stop: int) -> list[tuple[int, int]]:
    """(first stored row, how many) of every unbroken stretch that rows start to stop of a parameter are."""
    if rows is None or start >= stop:
        return [(start, stop - start)]
    blocks = range(start // rows.size, (stop - 1) // rows.size + 1)
    ends = [(max(start, block * rows.size), min(stop, (block + 1) * rows.size), block) for block in blocks]
    shift = rows.stride - rows.size  # rows of other parts that each block before leaves out
    return [(rows.start + block * shift + first, last - first) for first, last, block in ends]


def _read_json(file: Path) -> Json:
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the file again") from error
    return value if isinstance(value, dict) else {}


def _named_folders(folder: Path, config: Json) -> dict[str, Json]:
    """JSON files, as "<name>/<file>", of each folder that a field of config.json names, if that describes a model."""
    paths = {name: PurePosixPath(name) for name in config.values() if isinstance(name, str) and "\0" not in name}
    inside = [name for name, path in paths.items() if path.parts and not path.is_absolute() and ".." not in path.parts]
    told_by = ("config.json", "preprocessor_config.json")
    described = sorted(name for name in inside if any((folder / name / file).is_file() for file in told_by))
    return {f"{name}/{file.name}": _read_json(file) for name in described for file in (folder / name).glob("*.json")}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: weight_map is missing or empty; copy the file again")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / INDEX}: weight_map names a file outside the checkpoint folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    others = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
    hint = f"; {others[0]} is a pickle, convert it to safetensors" if others else ""
    raise CheckpointError(f"{folder}: has neither {WEIGHTS} nor {INDEX}{hint}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensor places of a safetensors file; the library checks the file, the header then tells the offsets."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error}); copy it again") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _to_float32(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float32)
