"""Numbers about numbers: correlations, bootstrap intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.floating[Any]]
RESAMPLES = 2000
RESAMPLED_AT_A_TIME = 2**22  # numbers drawn at a time: 32 MiB of positions


def correlation(predicted: Floats, observed: Floats) -> npt.NDArray[np.float64]:
    """Returns Pearson's correlation per column of two (rows, examples) arrays; NaN where one of them is constant."""
    x = np.asarray(predicted, dtype=np.float64)
    y = np.asarray(observed, dtype=np.float64)
    constant = (np.ptp(x, axis=0) == 0) | (np.ptp(y, axis=0) == 0)  # a rounded mean would hide it
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.where(constant, np.nan, (x * y).sum(axis=0) / np.where(constant, 1.0, scale))


def rank_correlation(predicted: Floats, observed: Floats) -> npt.NDArray[np.float64]:
    """Returns Spearman's correlation per column of two (rows, examples) arrays; NaN where one of them is constant."""
    return correlation(rankdata(predicted, axis=0), rankdata(observed, axis=0))


def mean_interval(values: npt.ArrayLike, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Returns the bootstrap interval (low, high) of the mean of values (examples,). Global random state is unchanged.

    NaN are left out; with fewer than 2 other values there is no interval, and both ends are NaN. Resampled are the
    examples: it says how far the mean would move with other examples of the same kind, not with other keep-vectors.

    Cost: 2,000 means over as many values, in blocks of bounded memory.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, Chapter 13, the percentile interval.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if len(array) < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    step = max(1, RESAMPLED_AT_A_TIME // len(array))
    means = np.concatenate(
        [
            array[generator.integers(0, len(array), (min(step, RESAMPLES - start), len(array)))].mean(axis=1)
            for start in range(0, RESAMPLES, step)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def explained_share(predicted: Floats, observed: Floats) -> npt.NDArray[np.float64]:
    """Returns R squared per column of two (rows, examples) arrays; NaN where the observed is constant."""
    y = np.asarray(observed, dtype=np.float64)
    missed = ((y - predicted) ** 2).sum(axis=0)
    total = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    constant = np.ptp(y, axis=0) == 0
    return np.where(constant, np.nan, 1.0 - missed / np.where(constant, 1.0, total))
