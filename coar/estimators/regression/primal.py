"""Ridge from the normal equations, K'K + ridge: for as many rows as components, or more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coar.estimators.regression.arrays import Array, Arrays, Matrix
from coar.estimators.regression.packed import PackedKeep
from coar.estimators.regression.spectrum import Spectrum


class PrimalSpectrum(Spectrum):
    """K'K = V diag(values) V': size is the number of components; coefficients are V'K'Y."""

    def __init__(self, keep: PackedKeep, arrays: Arrays, values: Matrix, vectors: Array) -> None:
        super().__init__(keep, arrays, values, vectors)
        self._rotated: list[tuple[slice, Array]] = []

    @classmethod
    def of(cls, keep: PackedKeep, arrays: Arrays) -> PrimalSpectrum:
        """Returns the decomposition. Cost: rows x components^2 multiplications, about 10 components^3 operations."""
        return cls(keep, arrays, *arrays.solve_spectrum(keep.gram(arrays)))

    @property
    def deficient(self) -> bool:
        """Whether an eigenvalue is zero."""
        return bool(self.values.min() <= 1e-9 * max(self.values.max(), 1e-300))

    def rotate(self, outputs: Array) -> Array:
        """Returns V'K'Y."""
        return self.vectors.T @ self.keep.cross(outputs, self.arrays)

    def explained(self, coefficients: Array, shrink: Array) -> Array:
        """Returns the sum over eigenvectors of coefficient^2 (2 shrink - value shrink^2)."""
        values = self.arrays.put(self.values)[:, None]
        return (coefficients**2 * (2 * shrink - values * shrink**2)).sum(axis=0)

    def weights(self, shrunk: Array) -> Array:
        """Returns V @ shrunk."""
        return self.vectors @ shrunk

    def fitted(self, shrunk: Array) -> Iterator[tuple[slice, Array]]:
        """Yields K V @ shrunk."""
        weights = self.vectors @ shrunk
        level = self.arrays.put(self.keep.mean()) @ weights
        for rows, K in self.keep.slabs(self.arrays):
            yield rows, K @ weights - level

    @property
    def lengths(self) -> Matrix:
        """The eigenvalues: of K V."""
        return self.values

    def scaled(self, shrink: Matrix) -> Matrix:
        """Returns shrink."""
        return shrink

    def rotated_rows(self) -> Iterator[tuple[slice, Array]]:
        """Yields K V. Cost: rows x components^2 multiplications, unless they were kept."""
        if self._rotated:
            yield from self._rotated
        else:
            for rows, rotated in self._rotate_rows():
                yield rows, self.arrays.narrow(rotated)

    def _rotate_rows(self) -> Iterator[tuple[slice, Array]]:
        """Yields K V in float64."""
        level = self.arrays.put(self.keep.mean()) @ self.vectors
        for rows, K in self.keep.slabs(self.arrays):
            rotated = K @ self.vectors
            rotated -= level
            yield rows, rotated

    def leverages(self, ridges: Matrix) -> Matrix:
        """Returns (K V)^2 @ shrink; keeps K V, narrow, where it fits. Cost: rows x components^2 multiplications."""
        shrink = self.arrays.put(self.shrink(ridges))
        result = np.empty((len(self.keep), len(ridges)))
        size = self.keep.components
        # beside V, in the room that the decomposition needed: see `FitMemory`
        keeps = len(self.keep) * self.arrays.narrow_bytes <= 2 * 8 * size
        self._rotated = []
        for rows, rotated in self._rotate_rows():
            if keeps:
                self._rotated.append((rows, self.arrays.narrow(rotated)))
            result[rows] = self.arrays.get(rotated**2 @ shrink)
        return result

    def variances(self, ridges: Matrix) -> Matrix:
        """Returns V^2 @ shrink."""
        shrink = self.arrays.put(self.shrink(ridges))
        result = np.empty((self.keep.components, len(ridges)))
        for start in range(0, len(result), 256):  # never squares the whole matrix at once
            result[start : start + 256] = self.arrays.get(self.vectors[start : start + 256] ** 2 @ shrink)
        return result
