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

from .folds import Fold
from .kv_cache import note_cache_factors
from .pack import Piece, pack_codes, pack_zero_points, unpack_codes, unpack_zero_points
from .ranges import Ranges
from .recipe import WeightFormat
from .rtn import Codes, Float32, dequantize_rows
from .source import WeightSource

__all__ = ["FactoredSource", "Factors", "FoundCodes", "FoundRole", "vector_of"]


@dataclass(frozen=True)
class FoundCodes:
    """Packed codes of a linear's weight in files, some rows at a time: they are as large as the package's own."""

    files: Mapping[Piece, Path]
    row_bytes: Mapping[Piece, int]
    format: WeightFormat

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
        return cls(files, {piece: array.nbytes // len(array) for piece, array in arrays.items()}, format)

    def rows(self, start: int, stop: int) -> dict[Piece, npt.NDArray[Any]]:
        """Rows start to stop of each piece: packed codes and zero points uint8, scales float32."""
        found: dict[Piece, npt.NDArray[Any]] = {}
        for piece, file in self.files.items():
            dtype, size = (np.float32, 4) if piece == "scales" else (np.uint8, 1)
            width = self.row_bytes[piece]
            values = np.fromfile(file, dtype, (stop - start) * width // size, offset=start * width)
            found[piece] = values.reshape(stop - start, width // size)
        return found

    def values(self, start: int, stop: int, num_columns: int) -> Float32:
        """What the codes of rows start to stop stand for, [stop - start, num_columns]."""
        rows, bits = self.rows(start, stop), self.format.bits
        scales = rows["scales"]
        zero_points = unpack_zero_points(rows["zero_points"], bits, scales.shape[1])
        return dequantize_rows(unpack_codes(rows["quantized"], bits), scales, zero_points, num_columns)


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


def vector_of(graph: ir.Graph, source: WeightSource, parameter: str) -> Float32 | None:
    """The values of a norm or a bias, a parameter of a checkpoint or a constant of a stored graph; None of a matrix."""
    value = graph.initializers[parameter].const_value
    if value is not None:
        return value.numpy().astype(np.float32)
    size, *others = source.shape(parameter)
    return None if others else source.rows(parameter, 0, size)


@dataclass
class Factors:
    """What folds move between the parameters of a float graph."""

    vectors: dict[str, Float32] = field(default_factory=dict[str, Float32])  # norms and biases, as they are then
    row_factors: dict[str, Float32] = field(default_factory=dict[str, Float32])
    column_factors: dict[str, Float32] = field(default_factory=dict[str, Float32])

    def add(self, fold: Fold, factors_C: Float32, graph: ir.Graph, source: WeightSource) -> None:
        """Factors [C] of one fold, of a graph that has none yet."""
        for name in fold.readers:
            self.column_factors[name] = factors_C[fold.channels]
        for rows in fold.writers:  # parts of one parameter may be written by several folds
            name, written = rows.parameter, self.vectors
            if name not in written and (vector := vector_of(graph, source, name)) is not None:
                written[name] = vector.copy()
            if name not in written:
                written = self.row_factors
                written.setdefault(name, np.ones(source.shape(name)[0], np.float32))
            written[name][rows.start : rows.start + fold.num_channels] /= factors_C

    def apply(self, model: ir.Model, source: WeightSource) -> WeightSource:
        """Puts the vectors into a float graph as constants; gives the source of the other weights."""
        for name, array in self.vectors.items():
            value = model.graph.initializers[name]
            assert value.dtype is not None, name
            value.const_value = ir.Tensor(array.astype(value.dtype.numpy()), name=name)
        note_cache_factors(model, self.column_factors)
        if not self.row_factors and not self.column_factors:
            return source
        return FactoredSource(source, self.row_factors, self.column_factors)


@dataclass
class FoundRole:
    """Of one role; `quantize_stage` fills it."""

    folder: Path  # of the files of codes
    codes: dict[str, FoundCodes] = field(default_factory=dict[str, FoundCodes])
    factors: Factors = field(default_factory=Factors)
    # Of keys and of values of each layer: the largest absolute value a channel, [key/value heads, head size].
    cache: list[tuple[Float32, Float32]] = field(default_factory=list[tuple[Float32, Float32]])
    ranges: Ranges | None = None  # where a recipe guards against what float16 cannot take

    def add_codes(self, parameter: str, codes: Codes, format: WeightFormat) -> None:
        """Keeps the codes of a weight."""
        self.codes[parameter] = FoundCodes.write(self.folder, len(self.codes), codes, format)

    def apply(self, model: ir.Model, source: WeightSource) -> WeightSource:
        """Puts the factors into a float graph; gives the source of its weights."""
        return self.factors.apply(model, source)
