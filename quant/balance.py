"""Balancing: factors, found without data, that share the work of rounding between activations and weights.

Dims: N outputs and K inputs of a linear, C channels of a fold (quant/folds.py).

    s [C] = sqrt(reach / need), to the nearest power of two     what writes a channel is divided by s, what reads it
                                                                multiplied
    reach [C]  of a norm |gamma| + |beta|; of a linear |w| of the row, over inputs of their own reach, + |bias|
    need [C]   root of the sum over the readers of the mean over rows, some of them, of (w / |w| of the row)^2

An activation that is rounded to 8 bits shares its scale with all channels of a token, or with those of a block, so a
few large channels leave the others few codes; a weight has a scale for each of its rows, or for each block of one. At s
both lose alike. This is SmoothQuant (arXiv 2211.10438) at strength 0.5, the weights that write an activation telling
how large it will be, as in cross-layer equalization (arXiv 1906.04721, equation 11): no data is needed. Outliers of the
residual stream itself, behind which no linear stands alone, stay what they are. Powers of two round nothing: in float
the function is the same to the bit, but for numbers too small to be normal.
"""

from collections.abc import Collection, Hashable

import numpy as np
import onnx_ir as ir

from .folds import Fold, find_folds
from .found import Factors, vector_of
from .recipe import Recipe, Target, WeightFormat
from .rtn import Float32
from .source import WeightSource

__all__ = ["TiedWeight", "balance", "balancing_factors"]

_LARGEST_EXPONENT = 16  # of a factor; channels further apart than that are as good as zero
_STRIP = 32  # rows of a weight that are read at once
_NUM_STRIPS = 16  # at least, evenly over a weight, that tell how large its columns are

TiedWeight = tuple[Hashable, WeightFormat | None]  # where a weight comes from, and how it is stored


def balance(
    graph: ir.Graph,
    role: str,
    recipe: Recipe,
    target: Target,
    source: WeightSource,
    tied: Collection[TiedWeight] = (),
) -> Factors:
    """The factors of each fold of a float graph all of whose readers say `balance`; the graph is left as it is.

    Weights that are `tied` are stored once, for two graphs, and stay as they are. So do all for cuda, whose kernels
    round no activations. Of weights that write channels all rows are read once more here, of others some.
    """
    factors = Factors()
    formats = {name: format for name in graph.initializers if (format := recipe.format_of(role, name, target))}
    if target != "cpu" or not any(format.balance for format in formats.values()):
        return factors
    folds = find_folds(graph)
    sizes = _Sizes(graph, source, {rows.parameter for fold in folds for rows in fold.writers})
    for fold in folds:
        readers = [formats.get(name) for name in fold.readers]
        if not all(
            format is not None and format.balance and (source.origin(name), format.stored) not in tied
            for name, format in zip(fold.readers, readers, strict=True)
        ):
            continue
        reach_C = sizes.reach(fold)
        factors_C = balancing_factors(reach_C, sizes.need(fold, reach_C))
        if (factors_C != 1).any():
            factors.add(fold, factors_C, graph, source)
    return factors


def balancing_factors(reach_C: Float32, need_C: Float32) -> Float32:
    """s [C], whose median is 1; 1 where reach or need is 0 or not finite."""
    factors_C = np.ones_like(reach_C)
    usable = np.isfinite(reach_C) & np.isfinite(need_C) & (reach_C != 0) & (need_C != 0)
    if usable.any():
        exponents = (np.log2(reach_C[usable]) - np.log2(need_C[usable])) / 2
        # One factor for all channels changes nothing, so the middle one is 1 and values keep their size.
        exponents = np.clip(np.rint(exponents - np.median(exponents)), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        factors_C[usable] = np.ldexp(np.float32(1), exponents.astype(np.int32))
    return factors_C


class _Sizes:
    """How large rows and columns of weights are, each weight read once."""

    def __init__(self, graph: ir.Graph, source: WeightSource, writers: Collection[str]) -> None:
        self._graph, self._source, self._writers = graph, source, writers
        self._rows: dict[str, Float32] = {}  # squares, by weight, [N]
        self._columns: dict[str, Float32] = {}  # squares of what is relative to the rows, [K]

    def reach(self, fold: Fold) -> Float32:
        """How large the channels of a fold may be, [C]."""
        reach_C = np.zeros(fold.num_channels, np.float32)
        for rows in fold.writers:
            sizes = vector_of(self._graph, self._source, rows.parameter)
            if sizes is None:
                self._read(rows.parameter, None)
                sizes = np.sqrt(self._rows[rows.parameter])
            reach_C += np.abs(sizes[rows.start : rows.start + fold.num_channels])
        return reach_C

    def need(self, fold: Fold, reach_C: Float32) -> Float32:
        """How large the columns are that read each channel, [C]."""
        need_C = np.zeros(fold.num_channels, np.float32)
        for name in fold.readers:
            self._read(name, reach_C[fold.channels])
            np.add.at(need_C, fold.channels, self._columns[name])
        return np.sqrt(need_C)

    def _read(self, name: str, reach_K: Float32 | None) -> None:
        """Reads a weight for its rows and its columns; one that was read for its rows alone is read again."""
        if name in self._columns or (reach_K is None and name in self._rows):
            return
        num_rows, num_columns = self._source.shape(name)
        squares_N = np.zeros(num_rows, np.float32)
        columns_K, num_sampled = np.zeros(num_columns, np.float32), 0
        weights_K = np.ones(num_columns, np.float32) if reach_K is None else reach_K**2
        stride = max(1, num_rows // (_STRIP * _NUM_STRIPS))
        for number, start in enumerate(range(0, num_rows, _STRIP)):
            is_sampled = reach_K is not None and number % stride == 0
            if not is_sampled and name not in self._writers:
                continue
            stop = min(start + _STRIP, num_rows)
            squares = np.square(self._source.rows(name, start, stop))
            squares_N[start:stop] = squares @ weights_K
            if is_sampled:
                inverse_N = np.zeros(stop - start, np.float32)
                np.divide(1, squares_N[start:stop], out=inverse_N, where=squares_N[start:stop] > 0)
                columns_K += inverse_N @ squares
                num_sampled += stop - start
        self._rows[name] = squares_N
        if reach_K is not None:
            self._columns[name] = columns_K / np.float32(max(1, num_sampled))
