"""Ridge regression of many examples at once: a penalty per example by leave-one-out, and the solution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coar.estimators.regression.arrays import Array, Arrays, Matrix
from coar.estimators.regression.dual import DualSpectrum
from coar.estimators.regression.packed import PackedKeep
from coar.estimators.regression.primal import PrimalSpectrum
from coar.estimators.regression.spectrum import Spectrum

# What part of a penalty's shrinkage may be lost when all penalties are compared by a few common columns. What is lost
# is bounded, and penalties that this leaves undecided are compared exactly: it sets the cost, and no result.
NEGLIGIBLE = 1e-5
ROWS_IN_CACHE = 64  # whose errors of all penalties are held at a time


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


def common_columns(factors: Matrix) -> tuple[Matrix, Matrix]:
    """Returns B (size, few) and C (few, ridges) with B @ C nearly the factors (size, ridges), column by column.

    1 / (eigenvalue + ridge) changes smoothly with the penalty: some five columns make nearly all of a grid.
    """
    length = np.linalg.norm(factors, axis=0)
    left, singular, right = np.linalg.svd(factors / length, full_matrices=False)
    few = max(1, int((singular > NEGLIGIBLE * singular[0]).sum()))
    return left[:, :few], singular[:few, None] * right[:few] * length


def leave_one_out(
    spectrum: Spectrum, penalties: Penalties, outputs: Array, coefficients: Array
) -> tuple[Matrix, Matrix]:
    """Returns the norm of the errors on rows left out one at a time, in closed form, and a bound on its error.

    Both (ridges, examples), in units of the norm of the example's outputs. Computed for all penalties from a few common
    columns, in narrow numbers. The bound holds what the columns leave out, exactly, and rounding as it grows in sums
    whose rounding errors are independent.

    Args:
      spectrum, penalties: Of the fitted rows; several penalties.
      outputs: Centred, (rows, examples).
      coefficients: `spectrum.rotate(outputs)`.

    Cost: some five products of rows x size x examples in narrow numbers, instead of one in float64 per penalty.
    Source: Golub, Heath and Wahba (1979), Generalized cross-validation; the PRESS statistic of Allen (1974). Rounding:
      Higham and Mary (2019), A new approach to probabilistic rounding error analysis.
    """
    arrays: Arrays = spectrum.arrays
    missed: Matrix = penalties.missed  # type: ignore[assignment]  # several penalties
    factors = spectrum.scaled(spectrum.shrink(penalties.ridges))
    basis, mix = common_columns(factors)
    few, examples = basis.shape[1], outputs.shape[1]
    unit = np.sqrt(arrays.get((outputs**2).sum(axis=0)))
    unit = arrays.put(np.where(unit > 0, unit, 1.0))  # narrow numbers have a narrow range, too
    coefficients = coefficients / unit
    columns = arrays.narrow(arrays.put(basis))[:, :, None] * arrays.narrow(coefficients)[:, None, :]
    columns = columns.reshape(len(basis), few * examples)
    signed = np.concatenate([mix, -np.ones((1, mix.shape[1]))]).T  # (ridges, few + 1): of the columns and the outputs
    squares = arrays.zeros(len(penalties.ridges), examples)
    parts = arrays.narrow(arrays.zeros(ROWS_IN_CACHE, few + 1, examples))
    for slab, rotated in spectrum.rotated_rows():
        fitted = (rotated @ columns).reshape(len(rotated), few, examples)
        for start in range(0, len(fitted), ROWS_IN_CACHE):
            some = fitted[start : start + ROWS_IN_CACHE]
            rows = slice(slab.start + start, slab.start + start + len(some))
            parts[: len(some), :few] = some
            parts[: len(some), few] = outputs[rows] / unit
            errors = arrays.narrow(arrays.put(missed[rows, :, None] * signed)) @ parts[: len(some)]
            errors *= errors
            squares += errors.sum(axis=0)
    norm = np.sqrt(arrays.get(squares))

    energy = coefficients**2
    lengths = spectrum.lengths[:, None]
    lost = np.sqrt(arrays.get(arrays.put(lengths * (factors - basis @ mix) ** 2).T @ energy))
    sizes = np.sqrt(arrays.get(arrays.put(lengths * basis**2).T @ energy))
    sizes = np.abs(mix).T @ sizes + 1.0  # the outputs' own
    rounding = arrays.rounding * (8 + np.sqrt(len(basis)))
    return norm, missed.max(axis=0)[:, None] * (lost + rounding * sizes) + ROWS_IN_CACHE * arrays.rounding * norm


def _exactly(
    spectrum: Spectrum, penalties: Penalties, outputs: Array, coefficients: Array, tried: npt.NDArray[np.intp]
) -> Matrix:
    """Returns the sum of squared leave-one-out errors in float64 of one tried penalty per example, (examples,)."""
    arrays = spectrum.arrays
    shrink = arrays.put(spectrum.shrink(penalties.ridges)[:, tried])
    squares = arrays.zeros(len(tried))
    for rows, fitted in spectrum.fitted(coefficients * shrink):
        fitted -= outputs[rows]
        fitted *= arrays.put(penalties.missed[rows][:, tried])  # type: ignore[index]  # several penalties
        fitted *= fitted
        squares += fitted.sum(axis=0)
    return arrays.get(squares)


def choose(spectrum: Spectrum, penalties: Penalties, outputs: Array, coefficients: Array) -> npt.NDArray[np.intp]:
    """Returns which penalty has the least leave-one-out error, (examples,); ties: the largest.

    Penalties that the bound of `leave_one_out` cannot tell apart are compared exactly.

    Cost: that of `leave_one_out`, and 2 rows x components multiplications per undecided example and penalty.
    """
    norm, bound = leave_one_out(spectrum, penalties, outputs, coefficients)
    possible = ~(norm - bound > (norm + bound).min(axis=0))  # what is NaN in narrow numbers is possible
    count, examples = possible.shape
    chosen: npt.NDArray[np.intp] = count - 1 - np.argmax(possible[::-1], axis=0)  # the only one, where there is one
    undecided = np.where(possible.sum(axis=0) != 1)[0]
    errors = np.full((count, len(undecided)), np.inf)
    ridges, columns = np.nonzero(possible[:, undecided])
    for start in range(0, len(ridges), examples):  # as many at a time as there are examples: no more memory
        ridge, column = ridges[start : start + examples], columns[start : start + examples]
        which = undecided[column]
        errors[ridge, column] = _exactly(spectrum, penalties, outputs[:, which], coefficients[:, which], ridge)
    chosen[undecided] = count - 1 - np.argmin(errors[::-1], axis=0)
    return chosen


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
        chosen = choose(spectrum, penalties, outputs, coefficients)
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
