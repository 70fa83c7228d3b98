"""What calibration found in a role, and how it reaches the writer: codes on disk, factors, vectors that changed.

Dims: N rows, K columns of a weight.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .pack import Piece, pack_codes, pack_zero_points
from .recipe import WeightFormat
from .rtn import Codes, Float32
from .source import WeightSource

__all__ = ["FactoredSource", "FoundCodes", "FoundRole"]


@dataclass(frozen=True)
class FoundCodes:
    """Packed codes of a linear's weight in files, some rows at a time: they are as large as the package's own."""

    files: Mapping[Piece, Path]
    row_bytes: Mapping[Piece, int]

    @classmethod
    def write(cls, folder: Path, number: int, codes: Codes, format: WeightFormat) -> "FoundCodes":
        """Puts codes into files of `folder`; `number` makes their names."""
        codes_NK, scales_NB, zero_points_NB = codes
        arrays: dict[Piece, npt.NDArray[Any]] = {
            "quantized": pack_codes(codes_NK, format, codes_NK.shape[1]),
            "scales": np.ascontiguousarray(scales_NB),
            "zero_points": pack_zero_points(zero_points_NB, format),
        }
        files: dict[Piece, Path] = {}
        for piece, array in arrays.items():
            files[piece] = folder / f"{number}.{piece}"
            array.tofile(files[piece])
        return cls(files, {piece: array.nbytes // len(array) for piece, array in arrays.items()})

    def rows(self, start: int, stop: int) -> dict[Piece, npt.NDArray[Any]]:
        """Rows start to stop of each piece: packed codes and zero points uint8, scales float32."""
        found: dict[Piece, npt.NDArray[Any]] = {}
        for piece, file in self.files.items():
            dtype, size = (np.float32, 4) if piece == "scales" else (np.uint8, 1)
            width = self.row_bytes[piece]
            values = np.fromfile(file, dtype, (stop - start) * width // size, offset=start * width)
            found[piece] = values.reshape(stop - start, width // size)
        return found


@dataclass(frozen=True)
class FactoredSource:
    """A WeightSource whose weights are those of `source` times factors, by parameter: of rows [N], of columns [K]."""

    source: WeightSource
    row_factors: Mapping[str, Float32]
    column_factors: Mapping[str, Float32]

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self.source.shape(parameter)

    def origin(self, parameter: str) -> Hashable:
        origin = self.source.origin(parameter)
        factors = [found.get(parameter) for found in (self.row_factors, self.column_factors)]
        if all(factor is None for factor in factors):
            return origin
        return (origin, *(None if factor is None else factor.tobytes() for factor in factors))

    def rows(self, parameter: str, start: int, stop: int) -> Float32:
        rows = self.source.rows(parameter, start, stop)
        columns, factors = self.column_factors.get(parameter), self.row_factors.get(parameter)
        if columns is not None:
            rows = rows * columns
        return rows if factors is None else rows * factors[start:stop, None]


@dataclass
class FoundRole:
    """Of one role; `quantize_stage` fills it."""

    folder: Path  # of the files of codes
    codes: dict[str, FoundCodes] = field(default_factory=dict[str, FoundCodes])
    vectors: dict[str, Float32] = field(default_factory=dict[str, Float32])  # norms and biases that folds changed
    row_factors: dict[str, Float32] = field(default_factory=dict[str, Float32])
    column_factors: dict[str, Float32] = field(default_factory=dict[str, Float32])
    # Of keys and of values of each layer: the largest absolute value a channel, [key/value heads, head size].
    cache: list[tuple[Float32, Float32]] = field(default_factory=list[tuple[Float32, Float32]])

    def add_codes(self, parameter: str, codes: Codes, format: WeightFormat) -> None:
        """Keeps the codes of a weight."""
        self.codes[parameter] = FoundCodes.write(self.folder, len(self.codes), codes, format)

    def apply(self, model: ir.Model, source: WeightSource) -> WeightSource:
        """Puts the vectors into a float graph as constants; gives the source of the other weights."""
        for name, array in self.vectors.items():
            value = model.graph.initializers[name]
            assert value.dtype is not None, name
            value.const_value = ir.Tensor(array.astype(value.dtype.numpy()), name=name)
        return FactoredSource(source, self.row_factors, self.column_factors)
