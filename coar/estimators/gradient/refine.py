"""The hybrid step: what a few hundred forward passes add to an estimate that is already good."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coar.estimators.gradient.shrinkage import Posterior

Doubles = npt.NDArray[np.float64]
NOISE_GRID = np.logspace(-2, 3, 26)  # variance of what no linear attribution explains, in units of that of errors


def refine(prior: Posterior, keep: npt.NDArray[np.bool_], outputs: Doubles) -> tuple[Posterior, Doubles]:
    """Returns the posterior given forward rows, and the bias (examples,). Mutates nothing.

    A regression of what the prior leaves unexplained, in which each weight may move as far as its variance says
    (generalised ridge). The variance of the remaining noise is chosen per example by marginal likelihood.

    Args:
      prior: Means and variances, (examples, components).
      keep: (rows, components) bool.
      outputs: (rows, examples).

    Cost: rows^2 x (components + 10 rows) operations per example.
    """
    K = keep.astype(np.float64)
    K -= K.mean(axis=0)
    Y = outputs - outputs.mean(axis=0)
    mean, variance = prior.mean.copy(), prior.variance.copy()
    for e in range(len(mean)):
        spread = variance[e]
        values, vectors = np.linalg.eigh((K * spread) @ K.T)
        values = np.maximum(values, 0.0)
        missed = vectors.T @ (Y[:, e] - K @ mean[e])
        scale = values.mean()
        if scale <= 0:
            continue
        total = values + NOISE_GRID[:, None] * scale
        likelihood = -(np.log(total) + missed**2 / total).sum(axis=1)
        best = total[int(np.argmax(likelihood))]
        loading = (spread[:, None] * K.T) @ vectors
        mean[e] += loading @ (missed / best)
        variance[e] = np.maximum(spread - (loading**2 / best).sum(axis=1), 0.0)
    bias = outputs.mean(axis=0) - mean @ keep.mean(axis=0)
    return Posterior(mean, variance), bias
