"""Ridge from the kernel matrix, KK' + ridge: for fewer rows than components."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coar.estimators.regression.arrays import Array, Arrays, Matrix
from coar.estimators.regression.packed import ROWS_AT_ONCE, PackedKeep
from coar.estimators.regression.spectrum import Spectrum


class DualSpectrum(Spectrum):
    """KK' = Q diag(values) Q': size is the number of rows; coefficients are Q'Y.

    One eigenvalue at least is zero, with the vector of ones: outputs and keep-vectors are centred.
    """

    @classmethod
    def of(cls, keep: PackedKeep, arrays: Arrays) -> DualSpectrum:
        """Returns the decomposition. Cost: rows^2 x components multiplications, about 10 rows^3 operations."""
        return cls(keep, arrays, *arrays.solve_spectrum(keep.kernel(arrays)))

    @property
    def deficient(self) -> bool:
        """Always: fewer rows than components."""
        return True

    def rotate(self, outputs: Array) -> Array:
        """Returns Q'Y."""
        return self.vectors.T @ outputs

    def explained(self, coefficients: Array, shrink: Array) -> Array:
        """Returns the sum over eigenvectors of value coefficient^2 (2 shrink - value shrink^2)."""
        values = self.arrays.put(self.values)[:, None]
        return (values * coefficients**2 * (2 * shrink - values * shrink**2)).sum(axis=0)

    def weights(self, shrunk: Array) -> Array:
        """Returns K'Q @ shrunk."""
        outputs = self.vectors @ shrunk
        outputs -= outputs.sum(axis=0) / len(self.keep)  # zero but for rounding
        return self.keep.cross(outputs, self.arrays)

    def fitted(self, shrunk: Array) -> Iterator[tuple[slice, Array]]:
        """Yields Q @ (values shrunk)."""
        scaled = self.arrays.put(self.values)[:, None] * shrunk
        for start in range(0, len(self.keep), ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, len(self.keep)))
            yield rows, self.vectors[rows] @ scaled

    @property
    def lengths(self) -> Matrix:
        """Ones: of Q."""
        return np.ones(len(self.values))

    def scaled(self, shrink: Matrix) -> Matrix:
        """Returns values shrink."""
        return np.asarray(self.values[:, None] * shrink)

    def rotated_rows(self) -> Iterator[tuple[slice, Array]]:
        """Yields Q."""
        for start in range(0, len(self.keep), ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, len(self.keep)))
            yield rows, self.arrays.narrow(self.vectors[rows])

    def leverages(self, ridges: Matrix) -> Matrix:
        """Returns Q^2 @ (values shrink)."""
        scaled = self.arrays.put(self.values[:, None] * self.shrink(ridges))
        result = np.empty((len(self.keep), len(ridges)))
        for start in range(0, len(result), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            result[rows] = self.arrays.get(self.vectors[rows] ** 2 @ scaled)
        return result

    def variances(self, ridges: Matrix) -> Matrix:
        """Returns (1 - (K'Q)^2 @ shrink) / ridge. Cost: rows^2 x components multiplications."""
        shrink = self.arrays.put(self.shrink(ridges))
        level = self.vectors.sum(axis=0)
        mean = self.arrays.put(self.keep.mean())
        result = np.empty((self.keep.components, len(ridges)))
        for start in range(0, len(result), ROWS_AT_ONCE):
            some = slice(start, min(start + ROWS_AT_ONCE, len(result)))
            K = self.keep.columns(some, self.arrays)
            seen = (K.T @ self.vectors - mean[some, None] * level) ** 2
            result[some] = 1.0 - self.arrays.get(seen @ shrink)
        return np.maximum(result, 0.0) / ridges
