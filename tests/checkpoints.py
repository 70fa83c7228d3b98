"""Random-weight checkpoints in upstream format, made for a test and written tensor by tensor.

Values are random bytes' worth of a small normal distribution; what is tested with them is structure and memory, not
answers.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmport.export.family import TensorRef, family_of

GOLDENS = Path(__file__).parent / "goldens"
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
ROWS = 4096  # written at once


def edited(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced, or taken out where it is None."""
    copied: dict[str, Any] = copy.deepcopy(dict(config))
    *parents, last = path.split(".")
    place = copied
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    if value is None:
        del place[last]
    return copied


def with_fields(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with fields set; "a__b" is a field of a part, and None is null."""
    copied: dict[str, Any] = copy.deepcopy(dict(config))
    for path, value in changes.items():
        *parts, name = path.split("__")
        place = copied
        for part in parts:
            place = place[part]
        place[name] = value
    return copied


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """config.json of a checkpoint, with fields set."""
    return with_fields(json.loads((folder / "config.json").read_text(encoding="utf-8")), **changes)


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a config.json implies."""
    refs: dict[str, tuple[int, ...]] = {}
    for role in family_of(config, Path("config.json")).roles(config).values():
        with FakeTensorMode():
            module = role.build()
        for name, value in module.named_parameters():
            ref: TensorRef = role.tensor(name, tuple(value.shape))
            refs[ref.name] = ref.shape
    return refs


def write_safetensors(file: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, seed: int = 0) -> None:
    """A safetensors file of random values, a few thousand rows at a time. dtype: F32, F16 or BF16."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + int(np.prod(shape)) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            left, columns = shape[0], int(np.prod(shape[1:]))
            while left:
                rows = min(left, ROWS)
                stream.write(encode(random_rows(generator, name, rows, columns), dtype))
                left -= rows


def random_rows(generator: np.random.Generator, name: str, rows: int, columns: int) -> np.ndarray:
    values = generator.standard_normal((rows, columns), dtype=np.float32)
    if "norm" in name or "ln_q" in name:
        return 1 + 0.02 * values
    return values * np.float32(0.02 if name.endswith("bias") else columns**-0.5)


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f4" if dtype == "F32" else "<f2").tobytes()


def write_checkpoint(
    folder: Path, config: dict[str, Any], *, dtype: str = "F32", num_shards: int = 1, documents: str = "tiny_a"
) -> Path:
    """A whole checkpoint folder; tokenizer and processor files are those of a golden case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    donor = GOLDENS / "qwen2_5_vl" / documents
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
        shutil.copy(donor / name, folder / name)
    tensors = tensors_of(config)
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        mine = names[shard::num_shards]
        write_safetensors(folder / file, {name: tensors[name] for name in mine}, dtype, seed=shard)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
