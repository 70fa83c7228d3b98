"""What an export cannot do without: reading the checkpoint, quantizing every tensor once, writing the package.

Each is done by itself, with nothing around it, and the three times are added.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmport.export.checkpoint import Checkpoint
from vlmport.export.family import family_of
from vlmport.quant.dynamic import quantize_channels
from vlmport.quant.pack import pack_codes, pack_zero_points
from vlmport.quant.recipe import WeightFormat, load_recipe
from vlmport.quant.rtn import quantize_rows

__all__ = ["Floor", "FloorTimes", "forget_cached"]

_CHUNK = 4 << 20  # bytes
_DIGESTED = 256 << 20


@dataclass(frozen=True)
class FloorTimes:
    """Seconds."""

    read: float
    quantize: float
    write: float
    digest: float | None = None  # sha256 of checkpoint and package, on one core; not in the floor

    @property
    def total(self) -> float:
        return self.read + self.quantize + self.write


class Floor:
    """The three parts, in a process of their own."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = Checkpoint.open(checkpoint)

    def measure(self, recipe: str, package: Path) -> FloorTimes:
        """`package` is what was made by the recipe: as much is written as it has, into a folder beside it."""
        return FloorTimes(self.read(), self.quantize(recipe), self.write(package), self.digest(package))

    def read(self) -> float:
        """Seconds for the weight files, in pieces of 4 MiB."""
        files = [file for file in self.checkpoint.files if file.suffix == ".safetensors"]
        forget_cached(files)
        buffer = bytearray(_CHUNK)
        started = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        return time.perf_counter() - started

    def quantize(self, recipe: str) -> float:
        """Seconds for every weight of the recipe, from bfloat16 in memory to packed bytes in memory, on all cores."""
        wanted = self._weights(recipe)
        values = np.random.default_rng(0).standard_normal(_CHUNK // 4, dtype=np.float32) * np.float32(0.02)
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)

        def pieces() -> Iterator[tuple[NDArray[np.uint16], WeightFormat]]:
            for (rows, columns), format in wanted:
                step = max(1, len(stored) // columns)
                for start in range(0, rows, step):
                    count = min(step, rows - start)
                    yield stored[: count * columns].reshape(count, columns), format

        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(_quantize, *zip(*pieces(), strict=True)):
                pass  # an error of a thread is raised here
        return time.perf_counter() - started

    def write(self, package: Path) -> float:
        """Seconds for as many bytes as the package has, synced to the disk."""
        size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        chunk = np.random.default_rng(0).bytes(_CHUNK)
        file = package.parent / f".{package.name}.floor"
        started = time.perf_counter()
        try:
            with file.open("wb", buffering=0) as stream:
                for start in range(0, size, _CHUNK):
                    stream.write(memoryview(chunk)[: min(_CHUNK, size - start)])
                os.fsync(stream.fileno())
            return time.perf_counter() - started
        finally:
            file.unlink(missing_ok=True)

    def digest(self, package: Path) -> float:
        """Seconds that one core needs for the sha256 of the checkpoint and of the package, by the rate of 256 MiB."""
        files = [*self.checkpoint.files, *(file for file in package.rglob("*") if file.is_file())]
        values = bytes(_DIGESTED)
        started = time.perf_counter()
        hashlib.sha256(values)
        return (time.perf_counter() - started) / _DIGESTED * sum(file.stat().st_size for file in files)

    def _weights(self, recipe: str) -> list[tuple[tuple[int, int], WeightFormat]]:
        """Rows and columns of each quantized tensor; one that two roles store alike counts once."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        rules = load_recipe(recipe)
        config = self.checkpoint.config
        found: dict[tuple[str, WeightFormat], tuple[int, int]] = {}
        for name, role in family_of(config, self.checkpoint.path).roles(config).items():
            with FakeTensorMode():
                module = role.build()
            for parameter, value in module.named_parameters():
                format = rules.format_of(name, parameter)
                if format is not None and format.is_quantized and value.dim() == 2:
                    tensor = role.tensor(parameter, tuple(value.shape)).name
                    stored = replace(format, balance=False)  # a tied head takes no factors of its own
                    found[tensor, stored] = (value.shape[0], value.shape[1])
        return [(size, format) for (_, format), size in found.items()]


def forget_cached(files: list[Path]) -> None:
    """Drops files from the page cache, so that whoever reads them next reads from the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _quantize(stored_NK: NDArray[np.uint16], format: WeightFormat) -> None:
    rows_NK = (stored_NK.astype(np.uint32) << 16).view(np.float32)
    if format.is_dynamic:
        quantize_channels(rows_NK)
        return
    codes, _, zero_points = quantize_rows(rows_NK, format)
    pack_codes(codes, format, codes.shape[1])
    pack_zero_points(zero_points, format)
