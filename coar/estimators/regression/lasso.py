"""Lasso by coordinate descent on the Gram matrix: the rows are read once, however many penalties are tried.

Objective, in scikit-learn's units: |y - K w|^2 / (2 rows) + penalty |w|_1, all centred.
Source: Friedman, Hastie and Tibshirani (2010), Regularization paths via coordinate descent, Section 2.2 (covariance
updates, warm starts, active sets).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

from coar.errors import FitError
from coar.estimators.regression.arrays import Arrays, Matrix
from coar.estimators.regression.packed import PackedKeep

# Penalties that are tried, as shares of the smallest one that leaves no weight (each example has its own).
PATH: Matrix = np.logspace(0, -3, 31)
# An example's path ends when its error has not improved for so many penalties: it only overfits from there.
PATIENCE = 4
# How far, as a share of the largest |K'y|, a solution's gradient may be from what the optimum demands.
TOLERANCE = 1e-7
PATH_TOLERANCE = 1e-5  # where penalties are compared
MOST_SWEEPS = 20_000


# Of the mean squared column: keeps the errors of weights that the rows cannot tell apart large, but finite.
FLOOR = 1e-10


def _compiled(parallel: bool) -> Callable[[Any], Any]:
    """Compiles with numba when first called; keeps the machine code on disk where a folder for it may be written."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(parallel=parallel, cache=True)(function)
        except RuntimeError:  # nowhere to keep it: neither the package's folder nor the user's
            return numba.njit(parallel=parallel)(function)

    return decorate


@_compiled(parallel=False)
def _find_active(weights: Matrix, active: npt.NDArray[np.intp]) -> int:
    """Writes the numbers of the components with a weight into `active`; returns how many."""
    count = 0
    for j in range(len(weights)):
        if weights[j] != 0:
            active[count] = j
            count += 1
    return count


@_compiled(parallel=False)
def _descend(
    G: Matrix, R: Matrix, penalty: float, weights: Matrix, product: Matrix, active: npt.NDArray[np.intp], limit: float
) -> bool:
    """Minimises w'Gw / 2 - R'w + penalty |w|_1 from `weights` on; overwrites weights, product (= G w), active.

    Sweeps over the active components until little changes, then looks at the gradients of all. Returns whether they
    were right within `limit`.
    """
    components, sweeps = len(R), 0
    count = _find_active(weights, active)
    while sweeps < MOST_SWEEPS:
        worst = np.inf
        while worst > limit / 4 and sweeps < MOST_SWEEPS:
            worst = 0.0
            sweeps += 1
            for a in range(count):
                j = active[a]
                old = weights[j]
                pull = R[j] - product[j] + G[j, j] * old
                new = np.sign(pull) * max(abs(pull) - penalty, 0.0) / G[j, j]
                if new != old:
                    weights[j] = new
                    if 4 * count > components:  # in order and of no use is faster than here and there
                        for i in range(components):
                            product[i] += (new - old) * G[j, i]
                    else:
                        for b in range(count):
                            product[active[b]] += (new - old) * G[j, active[b]]
                    worst = max(worst, abs(new - old) * G[j, j])
        count = _find_active(weights, active)
        product[:] = 0.0
        for a in range(count):
            product += weights[active[a]] * G[active[a]]
        right = True
        for j in range(components):
            gradient = R[j] - product[j]
            if weights[j] != 0:
                right &= abs(gradient - np.sign(weights[j]) * penalty) <= limit
            elif abs(gradient) > penalty + limit and G[j, j] > 0:
                right = False
                active[count] = j
                count += 1
        if right:
            return True
    return False


@_compiled(parallel=True)
def _choose_all(
    G: Matrix,
    R: Matrix,
    other_G: Matrix,
    other_R: Matrix,
    other_squares: Matrix,
    path: Matrix,
    tolerance: float,
    weights: Matrix,
    shares: npt.NDArray[np.intp],
    space: Matrix,
    places: npt.NDArray[np.intp],
) -> npt.NDArray[np.bool_]:
    """Walks every example down the path; leaves the best weights (examples, components) and where they were found.

    R and other_R are (examples, components). The error is measured on other rows: other_squares - 2 w'r + w'G w.
    """
    examples = len(R)
    converged = np.ones(examples, dtype=np.bool_)
    for e in numba.prange(examples):
        top = np.abs(R[e]).max()
        now, product, active = space[e, 0], space[e, 1], places[e]
        now[:] = 0.0
        product[:] = 0.0
        best = np.inf
        for step in range(len(path)):
            if top > 0 and not _descend(G, R[e], top * path[step], now, product, active, tolerance * top):
                converged[e] = False
                break
            error = other_squares[e]
            count = _find_active(now, active)
            for a in range(count):
                i = active[a]
                inner = -2 * other_R[e, i]
                for b in range(count):
                    inner += other_G[i, active[b]] * now[active[b]]
                error += now[i] * inner
            if error < best:
                best = error
                shares[e] = step
                weights[e] = now
            elif step - shares[e] >= PATIENCE:
                break
    return converged


@_compiled(parallel=True)
def _solve_all(
    G: Matrix,
    R: Matrix,
    penalties: Matrix,
    tolerance: float,
    weights: Matrix,
    space: Matrix,
    places: npt.NDArray[np.intp],
) -> npt.NDArray[np.bool_]:
    """Solves every example at its penalty, from `weights` (examples, components) on, which it overwrites."""
    examples, components = R.shape
    converged = np.ones(examples, dtype=np.bool_)
    for e in numba.prange(examples):
        product = space[e, 1]
        product[:] = 0.0
        for j in range(components):
            if weights[e, j] != 0:
                for i in range(components):
                    product[i] += weights[e, j] * G[j, i]
        top = np.abs(R[e]).max()
        if top > 0:
            converged[e] = _descend(G, R[e], penalties[e], weights[e], product, places[e], tolerance * top)
    return converged


@dataclass(frozen=True)
class LassoDesign:
    """The keep-vectors' part of the sums: of the rows that penalties are tried on, of those that judge, of all.

    Attributes:
      tried, judging: Keep-vectors of the rows.
      step: Mean keep-vector of the judging rows minus that of the tried ones, (components,).
      tried_gram, judging_gram: Centred on the mean of the tried rows, (components, components).
      gram: Of all rows, centred on their mean.
    """

    tried: PackedKeep
    judging: PackedKeep
    step: Matrix
    tried_gram: Matrix
    judging_gram: Matrix
    gram: Matrix

    @classmethod
    def of(cls, tried: PackedKeep, judging: PackedKeep, arrays: Arrays) -> LassoDesign:
        """Returns the sums. Cost: rows x components^2 multiplications."""
        step = judging.mean() - tried.mean()
        apart = np.multiply.outer(step, step)
        tried_gram, judging_gram = arrays.get(tried.gram(arrays)), arrays.get(judging.gram(arrays))
        gram = apart * (len(tried) * len(judging) / (len(tried) + len(judging)))
        gram += tried_gram
        gram += judging_gram
        apart *= len(judging)
        judging_gram += apart
        return cls(tried, judging, step, tried_gram, judging_gram, gram)


@dataclass(frozen=True)
class LassoSolution:
    """Lasso solutions of one slab: weights and stderr (components, examples); the rest (examples,)."""

    weights: Matrix
    stderr: Matrix
    lasso: Matrix
    nonzero: Matrix
    residual_sd: Matrix


def solve_lasso(design: LassoDesign, tried: Matrix, judging: Matrix, arrays: Arrays) -> LassoSolution:
    """Returns the lasso solution of every example, with the penalty that is best on the judging rows.

    The penalty is chosen with weights fitted to the tried rows; then all rows are fitted with it.

    Args:
      design: The keep-vectors.
      tried, judging: Outputs (rows, examples) of the two sets of rows, not centred.

    Raises:
      FitError: Coordinate descent did not converge for some example.
    """
    first, second = len(tried), len(judging)
    level, apart = tried.mean(axis=0), judging.mean(axis=0) - tried.mean(axis=0)
    cross, squares = _cross(design.tried, tried - level, arrays)
    other, other_squares = _cross(design.judging, judging - judging.mean(axis=0), arrays)
    both = first * second / (first + second)
    all_cross = cross + other + np.multiply.outer(both * apart, design.step)
    all_squares = squares + other_squares + both * apart**2
    other += np.multiply.outer(second * apart, design.step)
    other_squares += second * apart**2

    weights = np.zeros_like(cross)
    steps = np.zeros(len(weights), dtype=np.intp)
    space, places = np.empty((len(weights), 2, weights.shape[1])), np.empty(weights.shape, dtype=np.intp)
    judges = (design.judging_gram, other, other_squares)
    with _torch_threads_kept():
        done = _choose_all(design.tried_gram, cross, *judges, PATH, PATH_TOLERANCE, weights, steps, space, places)
        penalties = np.abs(cross).max(axis=1) * PATH[steps] / first  # per row
        done &= _solve_all(design.gram, all_cross, penalties * (first + second), TOLERANCE, weights, space, places)
    if not done.all():
        raise FitError(
            f"The lasso did not converge within {MOST_SWEEPS:,} sweeps for {int((~done).sum())} of {len(done)} "
            "examples: some components are ablated in almost the same rows. Run more rows, or use method='ridge'."
        )
    return _with_errors(design.gram, all_cross, all_squares, first + second, weights, penalties)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Gives torch its number of threads back: numba's first parallel loop sets it for all who use OpenMP."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _cross(keep: PackedKeep, outputs: Matrix, arrays: Arrays) -> tuple[Matrix, Matrix]:
    """Returns Y'K (examples, components) and the sum of squares (examples,) of centred outputs."""
    cross = arrays.get(keep.cross(arrays.put(outputs), arrays).T)
    return np.ascontiguousarray(cross), np.einsum("re,re->e", outputs, outputs)


def _with_errors(G: Matrix, R: Matrix, squares: Matrix, rows: int, weights: Matrix, penalties: Matrix) -> LassoSolution:
    """Returns the solution with least-squares errors: of the active weights, and of any other if it were active."""
    stderr = np.zeros_like(weights)
    residual_sd = np.zeros(len(weights))
    floor = FLOOR * np.diag(G).mean()
    for e, w in enumerate(weights):
        active = np.flatnonzero(w)
        inside = G[np.ix_(active, active)]
        residual = squares[e] - 2 * w[active] @ R[e, active] + w[active] @ inside @ w[active]
        residual_sd[e] = np.sqrt(max(residual, 0.0) / max(rows - 1 - len(active), 1))
        left = np.diag(G).copy()
        if len(active):
            factor = scipy.linalg.cholesky(inside + floor * np.eye(len(active)), lower=True, check_finite=False)
            seen = scipy.linalg.solve_triangular(factor, G[active], lower=True, check_finite=False)
            left -= np.einsum("ac,ac->c", seen, seen)
            inverse = scipy.linalg.solve_triangular(factor, np.eye(len(active)), lower=True, check_finite=False)
            left[active] = 1.0 / np.einsum("ab,ab->b", inverse, inverse)
        ever = np.diag(G) > 0  # never ablated, or always: nothing is known, nothing is said
        stderr[e, ever] = residual_sd[e] / np.sqrt(np.maximum(left[ever], floor))
    nonzero = np.count_nonzero(weights, axis=1).astype(np.float64)
    return LassoSolution(weights.T, stderr.T, penalties, nonzero, residual_sd)
