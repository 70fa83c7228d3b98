"""Makes checkpoints of random weights at a shape: bfloat16, sharded safetensors, real sizes everywhere, as a stream.

Tensor names and shapes are those that an export of the shape will ask for. A matrix is cut out of one pool of normally
distributed values, each piece at a place of its own: quantizers, kernels and disks see a normal distribution, and seven
billion values cost the time of writing them. A tensor depends on the seed and its name alone.
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmport.export.output import whole_folder

from .shapes import Shape
from .vocabulary import write_tokenizer

__all__ = ["SHARD_BYTES", "make_checkpoint", "plan_tensors", "shard_plan", "tensor_chunks", "write_checkpoint"]

SHARD_BYTES = 5_000_000_000  # as transformers cuts them
_POOL = 1 << 22  # values; 8 MB in bfloat16
_PIECE = 1 << 20  # values of a piece
_STD = 0.02  # what such models are initialised with; activations stay in the range of float16 with it
_ITEM = 2  # bytes of a bfloat16
_ONE = 0x3F80  # 1.0 as a bfloat16

Plan = Mapping[str, tuple[int, ...]]  # shape by published name, in the order of the files


def make_checkpoint(shape: Shape, folder: Path, *, seed: int = 0) -> None:
    """Writes a checkpoint of the shape.

    What its weights are called is found out in another process: that needs torch, which is larger than all that is done
    here.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        tensors = pool.submit(plan_tensors, shape).result()
    write_checkpoint(shape, tensors, folder, seed=seed)


def write_checkpoint(
    shape: Shape, tensors: Plan, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the folder, holding one piece of a tensor at a time; it is whole or it is not there."""
    with whole_folder(folder) as partial:
        _write_documents(shape, partial)
        shards = shard_plan(tensors, shard_bytes)
        names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
        pool_values = _normal_pool(seed)
        for name, shard in zip(names, shards, strict=True):
            _write_shard(partial / name, shard, pool_values, seed)
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_num_bytes(tensor_shape) for tensor_shape in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(partial / "model.safetensors.index.json", index)


def plan_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that an export of this shape reads, by their published names. Needs torch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from vlmport.export.family import family_of

    tensors: dict[str, tuple[int, ...]] = {}
    roles = family_of(shape.config, Path(f"benchmarks/shapes/{shape.name}.json")).roles(shape.config)
    for role in roles.values():
        with FakeTensorMode():
            module = role.build()
        for parameter, value in module.named_parameters():
            wanted = role.tensor(parameter, tuple(value.shape))
            tensors[shape.published(wanted.name)] = wanted.shape
    return tensors


def shard_plan(tensors: Plan, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, cut where a shard would become larger than `shard_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = _num_bytes(shape)
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def tensor_chunks(
    name: str, shape: tuple[int, ...], pool: NDArray[np.uint16], seed: int
) -> Iterator[NDArray[np.uint16]]:
    """The values of a tensor as the bits of bfloat16, piece by piece. Vectors called weight scale norms: they are 1."""
    left = math.prod(shape)
    if len(shape) == 1 and name.endswith("weight"):
        yield np.full(left, _ONE, np.uint16)
        return
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    while left:
        size = min(left, _PIECE)
        start = int(generator.integers(len(pool) - size + 1))
        yield pool[start : start + size]
        left -= size


def _normal_pool(seed: int) -> NDArray[np.uint16]:
    """Bits of bfloat16: the upper halves of float32."""
    values = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32) * np.float32(_STD)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_shard(file: Path, tensors: Plan, pool: NDArray[np.uint16], seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for chunk in tensor_chunks(name, shape, pool, seed):
                stream.write(chunk.astype("<u2", copy=False).data)


def _write_documents(shape: Shape, folder: Path) -> None:
    for file in sorted(shape.documents.glob("*.json")):
        if file.name != "tokenizer.json":
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / "config.json", shape.config)
    _write_json(folder / "generation_config.json", shape.generation_config)
    write_tokenizer(shape.documents / "tokenizer.json", folder / "tokenizer.json", shape.num_regular_tokens)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _num_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _ITEM
