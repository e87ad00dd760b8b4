"""Judging attributions: do they predict what the model does without components it was never tried without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate import Engine, Examples, KeepPlan
from coar.attributions import Attributions
from coar.errors import QueryError

Floats = npt.NDArray[np.floating[Any]]


def correlation(predicted: Floats, observed: Floats) -> npt.NDArray[np.float64]:
    """Returns Pearson's correlation per column of two (rows, examples) arrays; NaN where one of them is constant."""
    x = np.asarray(predicted, dtype=np.float64)
    y = np.asarray(observed, dtype=np.float64)
    constant = (np.ptp(x, axis=0) == 0) | (np.ptp(y, axis=0) == 0)  # a rounded mean would hide it
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.where(constant, np.nan, (x * y).sum(axis=0) / np.where(constant, 1.0, scale))


def explained_share(predicted: Floats, observed: Floats) -> npt.NDArray[np.float64]:
    """Returns R squared per column of two (rows, examples) arrays; NaN where the observed is constant."""
    y = np.asarray(observed, dtype=np.float64)
    missed = ((y - predicted) ** 2).sum(axis=0)
    total = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    constant = np.ptp(y, axis=0) == 0
    return np.where(constant, np.nan, 1.0 - missed / np.where(constant, 1.0, total))


def counterfactual_correlation(
    attributions: Attributions,
    keep: npt.NDArray[np.bool_],
    outputs: Any,
    examples: Sequence[int] | None = None,
) -> npt.NDArray[np.float64]:
    """Returns per example the correlation of predicted with true outputs over keep-vectors. Mutates nothing.

    Args:
      attributions: What predicts.
      keep: (rows, components) bool, rows that were not used for fitting.
      outputs: True outputs (rows, examples).
      examples: Positions of the examples in the attributions; None: all.

    Returns:
      (examples,), NaN where outputs are constant.
    Source: COAR (arXiv 2404.11534), Section 3, the evaluation of component attributions.
    """
    observed = np.asarray(outputs, dtype=np.float64)
    count = len(attributions) if examples is None else len(examples)
    if observed.shape != (len(keep), count):
        raise QueryError(f"outputs have shape {observed.shape}, expected ({len(keep)}, {count}): (rows, examples).")
    if len(keep) < 2:
        raise QueryError(f"A correlation needs at least 2 keep-vectors, got {len(keep)}.")
    return correlation(attributions.predict(keep, examples), observed)


@dataclass(frozen=True)
class Evaluation:
    """How well attributions predict fresh keep-vectors.

    Attributes:
      ablate_fraction, rows, seed: The keep-vectors.
      correlations: Per example, (examples,).
      predicted, actual: (rows, examples), in units of the output.
    """

    ablate_fraction: float
    rows: int
    seed: int
    correlations: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float32]
    actual: npt.NDArray[np.float32]

    def summary(self) -> pd.Series[float]:
        """Returns mean, quartiles, and the share of examples below 0.5."""
        r = self.correlations[np.isfinite(self.correlations)]
        low, median, high = np.quantile(r, [0.25, 0.5, 0.75]) if len(r) else (np.nan,) * 3
        mean, below = (float(r.mean()), float((r < 0.5).mean())) if len(r) else (np.nan, np.nan)
        return pd.Series(
            {"mean": mean, "25%": low, "median": median, "75%": high, "share below 0.5": below, "examples": len(r)}
        )


def evaluate(
    attributions: Attributions,
    engine: Engine,
    examples: Examples,
    *,
    rows: int = 200,
    ablate_fraction: float | None = None,
    seed: int = 1_000_003,
) -> Evaluation:
    """Returns the counterfactual correlation on keep-vectors drawn afresh, never those of the campaign.

    Args:
      attributions: What is judged.
      engine: The model, with the same index and output.
      examples: All examples of the attributions, in their order.
      rows: Number of fresh keep-vectors.
      ablate_fraction: Share of components ablated; None: the campaign's.
      seed: Must differ from the campaign's.

    Cost: rows x examples forwards.

    Raises:
      QueryError: The campaign's seed, fewer than 2 rows, or an engine or examples that the attributions are not about.
    """
    plan = attributions.header["identity"]["of"]["plan"]
    fraction = plan["ablate_fraction"] if ablate_fraction is None else ablate_fraction
    if seed == plan["seed"]:
        raise QueryError(f"seed={seed} is the campaign's: its keep-vectors were used for fitting. Give another seed.")
    if rows < 2:
        raise QueryError(f"A correlation needs at least 2 keep-vectors, got rows={rows}.")
    of = attributions.header["identity"]["of"]
    if engine.index != attributions.index:
        raise QueryError(f"The engine has index {engine.index.hash[:12]}, the attributions {of['index'][:12]}.")
    if engine.output.name != of["output"].split()[0]:
        raise QueryError(f"The engine's output is {engine.output.name}, the attributions are of {of['output']}.")
    if examples.hash != of["data"]:
        raise QueryError(
            f"These {len(examples):,} examples are not the {len(attributions):,} of the attributions (data hash "
            f"{examples.hash[:12]}, expected {of['data'][:12]}). Give all of them, in the campaign's order."
        )
    keep = KeepPlan(len(engine.index), rows, fraction, seed).take(0, rows)
    actual = engine.outputs(keep, examples).numpy().astype(np.float32, copy=False)
    predicted = attributions.predict(keep)
    return Evaluation(fraction, rows, seed, correlation(predicted, actual), predicted, actual)
