"""The keep-vectors that a regression is fitted to: as bits in memory, read as 0 and 1 a slab of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coar.estimators.regression.arrays import Array, Arrays, Matrix, NumpyArrays
from stores.format.keepbits import packed_width, unpack_keep

ROWS_AT_ONCE = 512  # enough for fast products; at 20,000 components 80 MB


@dataclass(frozen=True)
class PackedKeep:
    """Keep-vectors K (rows, components) in an eighth of their memory: `stores.format.keepbits` says in which order."""

    packed: npt.NDArray[np.uint8]
    components: int

    @classmethod
    def gather(cls, parts: list[npt.NDArray[np.uint8]], components: int) -> PackedKeep:
        """Returns packed keep-vectors that were collected block by block."""
        empty = np.zeros((0, packed_width(components)), dtype=np.uint8)
        return cls(np.concatenate([empty, *parts]), components)

    def __len__(self) -> int:
        return len(self.packed)

    def slabs(self, arrays: Arrays) -> Iterator[tuple[slice, Array]]:
        """Yields the rows in order, some hundred at a time: which, and K there as float64 (rows, components)."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, len(self)))
            yield rows, arrays.put(unpack_keep(self.packed[rows], self.components).view(np.uint8))

    def columns(self, components: slice, arrays: Arrays) -> Array:
        """Returns K of all rows and some components, the first of which is a multiple of 8; float64."""
        packed = self.packed[:, components.start // 8 : packed_width(components.stop)]
        return arrays.put(unpack_keep(packed, components.stop - components.start).view(np.uint8))

    def mean(self) -> Matrix:
        """Returns the mean keep-vector, (components,)."""
        total = np.zeros(self.components)
        for start in range(0, len(self), ROWS_AT_ONCE):
            total += unpack_keep(self.packed[start : start + ROWS_AT_ONCE], self.components).sum(axis=0)
        return total / max(len(self), 1)

    def cross(self, outputs: Array, arrays: Arrays) -> Array:
        """Returns K'Y, (components, examples), of outputs (rows, examples) that are centred: so K need not be."""
        total = arrays.zeros(self.components, outputs.shape[1])
        for rows, K in self.slabs(arrays):
            total += K.T @ outputs[rows]
        return total

    def predict(self, weights: Matrix) -> Matrix:
        """Returns K @ weights, (rows, examples), K not centred."""
        result = np.empty((len(self), weights.shape[1]))
        for rows, K in self.slabs(NumpyArrays()):
            result[rows] = K @ weights
        return result

    def gram(self, arrays: Arrays) -> Array:
        """Returns the centred K'K, (components, components). Cost: rows x components^2 multiplications."""
        total = arrays.zeros(self.components, self.components)
        for _, K in self.slabs(arrays):
            total += K.T @ K  # counts: exact
        mean = arrays.put(self.mean())
        total -= (len(self) * mean)[:, None] * mean
        return total

    def kernel(self, arrays: Arrays) -> Array:
        """Returns the centred KK', (rows, rows). Cost: rows^2 x components multiplications."""
        count = len(self)
        total = arrays.zeros(count, count)
        for rows, K in self.slabs(arrays):
            for others, L in self.slabs(arrays):
                if others.start > rows.start:
                    break
                product = K @ L.T  # counts: exact
                total[rows, others] = product
                total[others, rows] = product.T
        mean = total.sum(axis=0) / count
        level = mean.sum() / count
        total -= mean
        total -= mean[:, None]
        total += level
        return total
