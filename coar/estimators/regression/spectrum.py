"""What ridge regression needs of the keep-vectors: one eigendecomposition serves every example and every penalty.

K (rows, components) holds keep-vectors, centred; Y (rows, examples) outputs, centred: the intercept is never penalised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from coar.estimators.regression.arrays import Array, Arrays, Matrix
from coar.estimators.regression.packed import PackedKeep


class Spectrum(ABC):
    """The decomposition, primal (components x components) or dual (rows x rows): the same answers.

    `rotate` turns outputs into coefficients (size, examples). A penalty multiplies them by `shrink`, (size,); from the
    shrunk ones `weights` and `fitted` follow.
    """

    def __init__(self, keep: PackedKeep, arrays: Arrays, values: Matrix, vectors: Array) -> None:
        self.keep = keep
        self.arrays = arrays
        self.values = values
        self.vectors = vectors

    @property
    def scale(self) -> float:
        """The mean eigenvalue of K'K: the unit in which penalties are tried."""
        return float(self.values.sum()) / self.keep.components

    @property
    @abstractmethod
    def deficient(self) -> bool:
        """Whether some direction of keep-vectors was never seen, so that no unpenalised solution is unique."""

    def shrink(self, ridges: Matrix) -> Matrix:
        """Returns 1 / (eigenvalue + ridge), (size, ridges)."""
        return 1.0 / (self.values[:, None] + ridges)

    def freedom(self, ridges: Matrix) -> Matrix:
        """Returns the residual degrees of freedom, (ridges,): rows - 1 - trace of the hat matrix."""
        return np.asarray(len(self.keep) - 1 - (self.values[:, None] * self.shrink(ridges)).sum(axis=0))

    @abstractmethod
    def rotate(self, outputs: Array) -> Array:
        """Returns the coefficients (size, examples) of centred outputs (rows, examples)."""

    @abstractmethod
    def explained(self, coefficients: Array, shrink: Array) -> Array:
        """Returns by how much each example's sum of squared residuals is less than that of its outputs, (examples,)."""

    @abstractmethod
    def weights(self, shrunk: Array) -> Array:
        """Returns the weights (components, columns) of shrunk coefficients (size, columns)."""

    @abstractmethod
    def fitted(self, shrunk: Array) -> Iterator[tuple[slice, Array]]:
        """Yields, a slab of rows at a time, K @ weights of shrunk coefficients (size, columns)."""

    @property
    @abstractmethod
    def lengths(self) -> Matrix:
        """The squared length of every column of `rotated_rows`, (size,); the columns are orthogonal."""

    @abstractmethod
    def scaled(self, shrink: Matrix) -> Matrix:
        """Returns the factors, (size, ridges): rotated rows @ (factors x coefficients) is what `fitted` yields."""

    @abstractmethod
    def rotated_rows(self) -> Iterator[tuple[slice, Array]]:
        """Yields, a slab of rows at a time, the narrow (rows, size) matrix that fits without a change of basis."""

    @abstractmethod
    def leverages(self, ridges: Matrix) -> Matrix:
        """Returns the diagonal of the hat matrix without the intercept's 1 / rows, (rows, ridges)."""

    @abstractmethod
    def variances(self, ridges: Matrix) -> Matrix:
        """Returns the diagonal of (K'K + ridge)^-1, (components, ridges): the variance of weights per noise variance.

        The posterior variance under the prior that makes ridge the posterior mean, weights ~ N(0, noise / ridge): it
        holds the sampling error and, on average over components, the shrinkage.
        Source: Wahba (1983), Bayesian "confidence intervals" for the cross-validated smoothing spline; Nychka (1988).
        """
