"""Ridge regression of many outputs on the same keep-vectors, from sums that are collected block by block.

K (rows, components) holds keep-vectors as 0 and 1, Y (rows, examples) outputs. The intercept is never penalised: all is
centred. One eigendecomposition of the centred Gram matrix serves every example and every ridge penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

Matrix = npt.NDArray[np.float64]


class GramSums:
    """Sums over rows of the keep-vectors alone: count, sum of K, K'K. float64, exact for counts."""

    def __init__(self, components: int) -> None:
        self.rows = 0
        self.keep = np.zeros(components)
        self.gram = np.zeros((components, components))

    def add(self, K: Matrix) -> None:
        """Adds rows (rows, components)."""
        self.rows += len(K)
        self.keep += K.sum(axis=0)
        self.gram += K.T @ K

    def merge(self, other: GramSums) -> None:
        """Adds the rows of other sums."""
        self.rows += other.rows
        self.keep += other.keep
        self.gram += other.gram

    def mean(self) -> Matrix:
        """Returns the mean keep-vector, (components,)."""
        return self.keep / self.rows

    def centred(self) -> Matrix:
        """Returns the centred Gram matrix, (components, components), in memory of its own."""
        centred = np.multiply.outer(self.keep, self.keep)
        centred /= -self.rows
        centred += self.gram
        return centred


class OutputSums:
    """Sums over rows that involve the outputs of one slab of examples: K'Y, sum of Y and of Y squared.

    `shift` (examples,), about the size of the outputs, is subtracted first: no precision is lost on a common offset.
    """

    def __init__(self, components: int, shift: Matrix) -> None:
        self.rows = 0
        self.shift = shift
        self.cross = np.zeros((components, len(shift)))
        self.total = np.zeros(len(shift))
        self.squares = np.zeros(len(shift))

    def add(self, K: Matrix, Y: Matrix) -> None:
        """Adds rows of keep-vectors (rows, components) and outputs (rows, examples)."""
        shifted = Y - self.shift
        self.rows += len(K)
        self.cross += K.T @ shifted
        self.total += shifted.sum(axis=0)
        self.squares += np.einsum("re,re->e", shifted, shifted)

    def merge(self, other: OutputSums) -> None:
        """Adds the rows of other sums with the same shift."""
        self.rows += other.rows
        self.cross += other.cross
        self.total += other.total
        self.squares += other.squares

    def mean(self) -> Matrix:
        """Returns the mean output per example, (examples,)."""
        return self.total / self.rows + self.shift

    def centred_cross(self, mean_keep: Matrix) -> Matrix:
        """Returns the centred K'Y, (components, examples)."""
        return self.cross - np.multiply.outer(mean_keep, self.total)

    def centred_squares(self) -> Matrix:
        """Returns the centred sum of squares per example, (examples,)."""
        return np.maximum(self.squares - self.total**2 / self.rows, 0.0)


@dataclass(frozen=True)
class Spectrum:
    """The eigendecomposition of a centred Gram matrix: G = vectors @ diag(values) @ vectors.T."""

    values: Matrix
    vectors: Matrix
    mean: Matrix
    rows: int

    @classmethod
    def of(cls, sums: GramSums) -> Spectrum:
        """Returns the decomposition. Cost: about 10 components^3 operations and three matrices of that size."""
        values, vectors = scipy.linalg.eigh(sums.centred(), overwrite_a=True, check_finite=False, driver="evd")
        return cls(np.maximum(values, 0.0), vectors, sums.mean(), sums.rows)

    @property
    def scale(self) -> float:
        """The mean eigenvalue: the unit in which penalties are tried."""
        return float(self.values.mean())

    @property
    def deficient(self) -> bool:
        """Whether some direction of keep-vectors was never seen, so that no unpenalised solution is unique."""
        return bool(self.values.min() <= 1e-9 * max(self.values.max(), 1e-300))

    def shrunk(self, ridges: Matrix) -> Matrix:
        """Returns 1 / (eigenvalue + ridge), (components, ridges)."""
        return 1.0 / (self.values[:, None] + ridges)

    def variances(self, ridges: Matrix) -> Matrix:
        """Returns the variance of each weight per unit of noise variance, (components, ridges).

        The diagonal of (G + ridge)^-1 G (G + ridge)^-1: sampling noise of the estimate, not its shrinkage bias.
        """
        spectrum = self.values[:, None] * self.shrunk(ridges) ** 2
        result = np.empty((len(self.values), len(ridges)))
        for start in range(0, len(result), 256):  # never squares the whole matrix at once
            result[start : start + 256] = self.vectors[start : start + 256] ** 2 @ spectrum
        return result

    def freedom(self, ridges: Matrix) -> Matrix:
        """Returns the residual degrees of freedom, (ridges,): rows - 1 - trace of the hat matrix."""
        return np.asarray(self.rows - 1 - (self.values[:, None] * self.shrunk(ridges)).sum(axis=0))


def choose_ridge(spectrum: Spectrum, ridges: Matrix, sums: OutputSums, K: Matrix, Y: Matrix) -> npt.NDArray[np.intp]:
    """Returns per example the position of the penalty with the least squared error on rows (K, Y) that were not fitted.

    Args:
      spectrum, sums: Of the fitted rows.
      ridges: Penalties, ascending; ties go to the largest.
      K, Y: Keep-vectors (rows, components) and outputs (rows, examples) of other rows.
    """
    rotated = spectrum.vectors.T @ sums.centred_cross(spectrum.mean)
    seen = (K - spectrum.mean) @ spectrum.vectors
    wanted = Y - sums.mean()
    shrunk = spectrum.shrunk(ridges)
    errors = np.empty((len(ridges), rotated.shape[1]))
    for r in range(len(ridges)):
        missed = wanted - seen @ (rotated * shrunk[:, r, None])
        errors[r] = np.einsum("re,re->e", missed, missed)
    return np.asarray(len(ridges) - 1 - np.argmin(errors[::-1], axis=0))


@dataclass(frozen=True)
class Solution:
    """Ridge solutions of one slab: weights and stderr (components, examples), bias and residual_sd (examples,)."""

    weights: Matrix
    stderr: Matrix
    bias: Matrix
    residual_sd: Matrix


def solve(
    spectrum: Spectrum, ridges: Matrix, variances: Matrix, chosen: npt.NDArray[np.intp], sums: OutputSums
) -> Solution:
    """Returns the ridge solution of every example, with penalty `ridges[chosen[example]]`.

    `variances` is `spectrum.variances(ridges)`, computed once for all slabs.
    """
    rotated = spectrum.vectors.T @ sums.centred_cross(spectrum.mean)
    shrunk = spectrum.shrunk(ridges)[:, chosen]
    explained = (rotated**2 * (2 * shrunk - spectrum.values[:, None] * shrunk**2)).sum(axis=0)
    residual = np.maximum(sums.centred_squares() - explained, 0.0)
    residual_sd = np.sqrt(residual / np.maximum(spectrum.freedom(ridges)[chosen], 1.0))
    rotated *= shrunk
    weights = spectrum.vectors @ rotated
    return Solution(
        weights=weights,
        stderr=np.sqrt(variances[:, chosen]) * residual_sd,
        bias=sums.mean() - spectrum.mean @ weights,
        residual_sd=residual_sd,
    )
