"""Ridge regression of many examples at once: a penalty per example by leave-one-out, and the solution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coar.estimators.arrays import Arrays, Matrix
from coar.estimators.dual import DualSpectrum
from coar.estimators.normal import PrimalSpectrum
from coar.estimators.packed import PackedKeep
from coar.estimators.spectrum import Spectrum

# What part of a penalty's shrinkage may be lost when the errors of all penalties are made from a few common columns.
# 1e-10 is a quarter faster, and chose a neighbour of the best penalty where rows are fewer than components and the
# errors of small penalties are nearly equal.
NEGLIGIBLE = 1e-14


def decompose(keep: PackedKeep, arrays: Arrays) -> Spectrum:
    """Returns the decomposition, primal where there are at least as many rows as components, else dual."""
    return (PrimalSpectrum if len(keep) >= keep.components else DualSpectrum).of(keep, arrays)


@dataclass(frozen=True)
class Penalties:
    """The penalties that are tried, and what follows from them and the keep-vectors alone.

    Attributes:
      ridges: Ascending, (ridges,).
      variances: Of weights per noise variance, (components, ridges).
      missed: 1 / (1 - leverage) of each row, (rows, ridges); None for one penalty: nothing is chosen.
    """

    ridges: Matrix
    variances: Matrix
    missed: Matrix | None

    @classmethod
    def of(cls, spectrum: Spectrum, ridges: Matrix) -> Penalties:
        """Returns what one or several penalties need."""
        missed = None
        if len(ridges) > 1:
            missed = spectrum.leverages(ridges)
            missed += 1.0 / len(missed)  # the intercept's
            np.subtract(1.0, missed, out=missed)
            np.reciprocal(missed, out=missed)
        return cls(ridges, spectrum.variances(ridges), missed)


def common_columns(shrink: Matrix) -> tuple[Matrix, Matrix]:
    """Returns B (size, few) and C (few, ridges) with B @ C = shrink to rounding, column by column.

    1 / (eigenvalue + ridge) changes smoothly with the penalty: some ten columns make all of a grid.
    """
    length = np.linalg.norm(shrink, axis=0)
    left, singular, right = np.linalg.svd(shrink / length, full_matrices=False)
    few = max(1, int((singular > NEGLIGIBLE * singular[0]).sum()))
    return left[:, :few], singular[:few, None] * right[:few] * length


def leave_one_out(spectrum: Spectrum, penalties: Penalties, outputs: Matrix, coefficients: Matrix) -> Matrix:
    """Returns the sum of squared errors on rows that were left out one at a time, (ridges, examples), in closed form.

    Args:
      spectrum, penalties: Of the fitted rows; several penalties.
      outputs: Centred, (rows, examples).
      coefficients: `spectrum.rotate(outputs)`.

    Cost: some ten products of rows x components x examples, instead of one per penalty.
    Source: Golub, Heath and Wahba (1979), Generalized cross-validation; the PRESS statistic of Allen (1974).
    """
    arrays: Arrays = spectrum.arrays
    basis, mix = common_columns(spectrum.shrink(penalties.ridges))
    few, examples = basis.shape[1], outputs.shape[1]
    columns = arrays.put(basis)[:, :, None] * coefficients[:, None, :]
    mixed = arrays.put(np.ascontiguousarray(mix.T))
    errors = arrays.zeros(len(penalties.ridges), examples)
    for rows, parts in spectrum.fitted(columns.reshape(len(basis), few * examples)):
        residuals = mixed @ parts.reshape(-1, few, examples)  # of each row (ridges, examples)
        residuals -= outputs[rows][:, None, :]
        residuals *= arrays.put(penalties.missed[rows])[:, :, None]  # type: ignore[index]  # several penalties
        residuals *= residuals
        errors += residuals.sum(axis=0)
    return arrays.get(errors)


@dataclass(frozen=True)
class Solution:
    """Ridge solutions of one slab of examples.

    weights and stderr (components, examples); ridge (examples,) and residual_sd (examples,).
    """

    weights: Matrix
    stderr: Matrix
    ridge: Matrix
    residual_sd: Matrix


def solve(spectrum: Spectrum, penalties: Penalties, outputs: Matrix) -> Solution:
    """Returns the ridge solution of every example, with the penalty of least leave-one-out error; ties: the largest.

    Args:
      spectrum, penalties: Of the fitted rows.
      outputs: Centred, (rows, examples), where `spectrum.arrays` puts them.
    """
    arrays = spectrum.arrays
    coefficients = spectrum.rotate(outputs)
    count = len(penalties.ridges)
    chosen: npt.NDArray[np.intp] = np.zeros(outputs.shape[1], dtype=np.intp)
    if count > 1:
        errors = leave_one_out(spectrum, penalties, outputs, coefficients)
        chosen = count - 1 - np.argmin(errors[::-1], axis=0)
    shrink = arrays.put(spectrum.shrink(penalties.ridges)[:, chosen])
    explained = arrays.get(spectrum.explained(coefficients, shrink))
    residual = np.maximum(arrays.get((outputs**2).sum(axis=0)) - explained, 0.0)  # rounding may go below zero
    residual_sd = np.sqrt(residual / np.maximum(spectrum.freedom(penalties.ridges)[chosen], 1.0))
    coefficients *= shrink
    return Solution(
        weights=arrays.get(spectrum.weights(coefficients)),
        stderr=np.sqrt(penalties.variances[:, chosen]) * residual_sd,
        ridge=penalties.ridges[chosen],
        residual_sd=residual_sd,
    )
