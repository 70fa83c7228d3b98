"""Gives a checkpoint channels with outliers, as large models have them, without changing what it computes.

    python examples/outliers/outliers.py CHECKPOINT -o FOLDER [--share 0.03] [--factors 20 100] [--seed 0]

Where a tensor writes channels that only linears read (a norm, or a linear with nothing but products behind it), channel
j may be made a times as large if the columns that read it are made a times smaller:

    W_writer[j] * a,  b_writer[j] * a,  W_reader[:, j] / a

In exact arithmetic the answers are the same; in float32 they differ by rounding. A quantizer now meets what real models
do to it. Which tensors form such pairs is data (pairs.json). Dims: N outputs, K inputs, C channels of a pair.
"""

import argparse
import json
import re
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmport.export.checkpoint import INDEX, Checkpoint, CheckpointSource, StoredTensor
from vlmport.export.family import family_of
from vlmport.export.fields import read_size
from vlmport.export.output import whole_folder
from vlmport.export.text_config import text_at, text_config
from vlmport.runtime.errors import CheckpointError, InputError, VlmportError
from vlmport.runtime.schema import from_json

PAIRS = Path(__file__).parent / "pairs.json"
_READABLE = ("F32", "F16", "BF16")
_CHUNK_BYTES = 16 << 20  # float32 bytes that are in memory at once

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """One tensor that writes channels, and all linears that read them. `{}` stands for the number of a layer.

    rows: which rows of the writer are the channels. columns: how a reader's columns follow from the channels:
    "repeated" side by side, several times; "shared heads": each key/value head is read by several query heads.
    """

    name: str
    writer: str
    readers: tuple[str, ...]
    rows: Literal["all", "last third"] = "all"
    columns: Literal["same", "repeated", "shared heads"] = "same"


@dataclass(frozen=True)
class Pairs:
    """The pairs of the checkpoints that name their tensors alike."""

    model_types: tuple[str, ...]
    pairs: tuple[Pair, ...]


@dataclass
class Scales:
    """What rows and columns of tensors are multiplied by, by tensor name; pairs that share a tensor multiply."""

    rows: dict[str, Float64] = field(default_factory=dict)
    columns: dict[str, Float64] = field(default_factory=dict)
    num_found: dict[str, int] = field(default_factory=dict)  # how often each pair was found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Channel outliers for a checkpoint, its function unchanged.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.03, help="of the channels of each pair (default: 0.03)")
    parser.add_argument("--factors", type=float, nargs=2, default=(20.0, 100.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        found = add_outliers(args.checkpoint, args.output, share=args.share, factors=args.factors, seed=args.seed)
    except VlmportError as error:
        print(f"outliers: error: {error}", file=sys.stderr)
        return 2
    for name, count in found.items():
        print(f"{name:26} {count:4d}")
    return 0


def add_outliers(
    checkpoint: Path, output: Path, *, share: float = 0.03, factors: Sequence[float] = (20.0, 100.0), seed: int = 0
) -> dict[str, int]:
    """Writes the checkpoint with outliers in float32 (float16 would round them); gives how often each pair was found.

    Factors are drawn from `factors`, evenly on a logarithmic scale. A pair's channels depend on its name, its layer and
    the seed alone. Raises VlmportError where the checkpoint or an option cannot be used; then nothing is written.
    """
    if output.exists():
        raise InputError(f"{output}: exists already; choose another -o")
    if not (0 < share <= 1 and 0 < factors[0] <= factors[1]):
        raise InputError(f"share {share}, factors {tuple(factors)}: a share is in (0, 1], factors go up from above 0")
    opened = Checkpoint.open(checkpoint)
    table = from_json(Pairs, json.loads(PAIRS.read_text(encoding="utf-8")))
    if opened.config.get("model_type") not in table.model_types:
        kinds = ", ".join(table.model_types)
        raise CheckpointError(
            f"{checkpoint}: model_type {opened.config.get('model_type')!r} has no pairs in {PAIRS.name}, only {kinds}; "
            "add them there"
        )
    for name, tensor in opened.tensors.items():
        if tensor.dtype not in _READABLE:
            raise CheckpointError(f"{checkpoint}: {name} is {tensor.dtype}, of {', '.join(_READABLE)} only")
    scales = plan(opened, table.pairs, share, factors, seed)
    with whole_folder(output) as folder:
        _copy_documents(opened, folder)
        for file in sorted({tensor.file for tensor in opened.tensors.values()}):
            _write_weights(opened, file, scales, folder / file.name)
    return scales.num_found


def plan(checkpoint: Checkpoint, pairs: Sequence[Pair], share: float, factors: Sequence[float], seed: int) -> Scales:
    """Draws channels and factors of every pair that the checkpoint has."""
    normalise = family_of(checkpoint.config, checkpoint.path / "config.json").normalise
    stored = {normalise(name): name for name in checkpoint.tensors}
    shape = {name: checkpoint.tensors[own].shape for name, own in stored.items()}
    num_kv_heads = read_size(checkpoint.config, f"{text_at(checkpoint.config)}num_key_value_heads")
    scales = Scales()
    for pair in pairs:
        layers = _layers(pair, stored)
        if layers:
            scales.num_found[pair.name] = len(layers)
        for layer in layers:
            writer = pair.writer.format(layer)
            num_rows = shape[f"{writer}.weight"][0]
            num_channels = num_rows if pair.rows == "all" else num_rows // 3
            generator = np.random.default_rng([seed, zlib.crc32(f"{pair.name} {layer}".encode())])
            factors_C = _draw(generator, num_channels, share, factors)
            for ending in ("weight", "bias"):
                if f"{writer}.{ending}" in stored:
                    own = stored[f"{writer}.{ending}"]
                    rows = scales.rows.setdefault(own, np.ones(num_rows))
                    rows[num_rows - num_channels :] *= factors_C
            for reader in pair.readers:
                name = f"{reader.format(layer)}.weight"
                num_columns = shape[name][1]
                columns_K = factors_C[_channels(pair, num_columns, num_channels, num_kv_heads)]
                scales.columns.setdefault(stored[name], np.ones(num_columns))[:] /= columns_K
    if not scales.num_found:
        raise CheckpointError(f"{checkpoint.path}: has none of the pairs of {PAIRS.name}; add its names there")
    return scales


def _layers(pair: Pair, stored: Mapping[str, str]) -> list[str]:
    """Numbers of the layers that have the pair ("" where it has no layers). Raises CheckpointError for half a pair."""
    pattern = re.compile(re.escape(f"{pair.writer}.weight").replace(re.escape("{}"), r"(\d+)"))
    matches = [match for name in stored if (match := pattern.fullmatch(name))]
    layers = sorted(("".join(match.groups()) for match in matches), key=lambda layer: int(layer or 0))
    found: list[str] = []
    for layer in layers:
        there = [f"{reader.format(layer)}.weight" in stored for reader in pair.readers]
        if any(there) and not all(there):
            raise CheckpointError(f"{pair.name}: layer {layer} has only some of {', '.join(pair.readers)}")
        if all(there):
            found.append(layer)
    return found


def _draw(generator: np.random.Generator, num_channels: int, share: float, factors: Sequence[float]) -> Float64:
    """Factors [C]: 1, but for a share of the channels (one at least)."""
    factors_C = np.ones(num_channels)
    chosen = generator.choice(num_channels, max(1, round(share * num_channels)), replace=False)
    factors_C[chosen] = np.exp(generator.uniform(*np.log(factors), len(chosen)))
    return factors_C


def _channels(pair: Pair, num_columns: int, num_channels: int, num_kv_heads: int) -> NDArray[np.int64]:
    """The channel that each column of a reader reads, [K]."""
    columns = np.arange(num_columns)
    if pair.columns == "shared heads":
        head_dim, sharing = num_channels // num_kv_heads, num_columns // num_channels
        return columns // head_dim // sharing * head_dim + columns % head_dim
    assert pair.columns == "repeated" or num_columns == num_channels, (pair.name, num_columns, num_channels)
    return columns % num_channels


def _copy_documents(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything but the weights; what the files say about dtype and size is made true."""
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, text_config(config), config.get("vision_config", {})):
        part |= {key: "float32" for key in ("torch_dtype", "dtype") if key in part}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        total = sum(_num_bytes(tensor) for tensor in checkpoint.tensors.values())
        index["metadata"] = {"total_size": total}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_weights(checkpoint: Checkpoint, file: Path, scales: Scales, target: Path) -> None:
    """One safetensors file anew in float32, some rows at a time."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.file == file}
    source = CheckpointSource(tensors, {name: tensor.shape for name, tensor in tensors.items()})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _num_bytes(tensor)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of eight
    with target.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            step = max(1, _CHUNK_BYTES * tensor.shape[0] // max(1, _num_bytes(tensor)))
            for start in range(0, tensor.shape[0], step):
                rows = source.rows(name, start, min(start + step, tensor.shape[0]))
                stream.write(_scaled(rows, name, start, scales).astype("<f4").tobytes())


def _scaled(rows: NDArray[np.float32], name: str, start: int, scales: Scales) -> NDArray[np.float64]:
    """Rows of a tensor from `start` with their factors, multiplied in float64: rounded once, when they are stored."""
    values = rows.astype(np.float64)
    if name in scales.rows:
        values *= scales.rows[name][start : start + len(rows)].reshape(-1, *[1] * (values.ndim - 1))
    if name in scales.columns:
        values *= scales.columns[name]
    return values


def _num_bytes(tensor: StoredTensor) -> int:
    return 4 * int(np.prod(tensor.shape, dtype=np.int64))


if __name__ == "__main__":
    sys.exit(main())
