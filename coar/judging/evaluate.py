"""Judging attributions: do they predict what the model does without components it was never tried without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch.utils.data import Dataset

from ablate import Engine, Examples, KeepPlan
from coar.attributions.attributions import Attributions
from coar.attributions.same_subject import engine_differences, listed, output_name
from coar.errors import QueryError
from coar.statistics import correlation, mean_interval, rank_correlation

ABLATE_FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""From far fewer ablations than campaigns make to far more: where a linear prediction is easy, and where it is not."""


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
class FractionEvaluation:
    """How well attributions predict fresh keep-vectors of one ablate fraction.

    Attributes:
      ablate_fraction: Share of components ablated.
      correlations, spearman: Pearson's and Spearman's correlation per example, (examples,) float64; NaN where predicted
        or true outputs are the same in all rows.
      predicted, actual: (rows, examples) float32, in units of the output.
    """

    ablate_fraction: float
    correlations: npt.NDArray[np.float64]
    spearman: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float32]
    actual: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls, ablate_fraction: float, predicted: npt.NDArray[np.float32], actual: npt.NDArray[np.float32]
    ) -> FractionEvaluation:
        """Returns the evaluation of predictions against true outputs, both (rows, examples). Mutates nothing."""
        both = correlation(predicted, actual), rank_correlation(predicted, actual)
        return cls(ablate_fraction, *both, predicted, actual)

    @property
    def undefined(self) -> int:
        """For how many examples there is no correlation."""
        return int((~np.isfinite(self.correlations)).sum())

    def summary(self) -> pd.Series[float]:
        """Returns statistics of the examples' correlations; those that are not defined are left out.

        Returns:
          mean; low and high (95 % bootstrap interval of the mean, over examples: see `mean_interval`); 25%, median,
          75%; share below 0.5; spearman (mean of Spearman's); examples (how many have a correlation).
        """
        r = self.correlations[np.isfinite(self.correlations)]
        ranked = self.spearman[np.isfinite(self.spearman)]
        first, median, third = np.quantile(r, [0.25, 0.5, 0.75]) if len(r) else (np.nan,) * 3
        low, high = mean_interval(r)
        return pd.Series(
            {
                "mean": r.mean() if len(r) else np.nan,
                "low": low,
                "high": high,
                "25%": first,
                "median": median,
                "75%": third,
                "share below 0.5": (r < 0.5).mean() if len(r) else np.nan,
                "spearman": ranked.mean() if len(ranked) else np.nan,
                "examples": len(r),
            }
        )


@dataclass(frozen=True)
class Evaluation:
    """How well attributions predict fresh keep-vectors of one or several ablate fractions.

    Asked for numbers of one fraction (`correlations`, `summary()`, ...) it answers if there is but one; otherwise take
    one with `at`.

    Attributes:
      rows: Keep-vectors per fraction.
      seed: Of the keep-vectors. Row i of a larger fraction ablates what row i of a smaller one does, and more.
      fractions: One evaluation per ablate fraction, in the order given.
    """

    rows: int
    seed: int
    fractions: tuple[FractionEvaluation, ...]

    def __repr__(self) -> str:
        means = (f"{f.summary()['mean']:.3f} at {100 * f.ablate_fraction:g} %" for f in self.fractions)
        return f"<Evaluation: {self.rows} fresh keep-vectors, mean correlation {', '.join(means)} ablated>"

    def at(self, ablate_fraction: float) -> FractionEvaluation:
        """Returns the evaluation of one ablate fraction. Raises QueryError for one that was not evaluated."""
        for found in self.fractions:
            if found.ablate_fraction == ablate_fraction:
                return found
        raise QueryError(f"Nothing was evaluated at ablate fraction {ablate_fraction}, only at {self._known}.")

    def table(self) -> pd.DataFrame:
        """Returns one row per ablate fraction: `ablate_fraction` and the statistics of `FractionEvaluation.summary`."""
        rows = [{"ablate_fraction": f.ablate_fraction, **f.summary().to_dict()} for f in self.fractions]
        return pd.DataFrame(rows).astype({"examples": np.int64})

    def summary(self) -> pd.Series[float]:
        """Returns the statistics of the only ablate fraction, see `FractionEvaluation.summary`."""
        return self._only.summary()

    @property
    def ablate_fraction(self) -> float:
        """The only ablate fraction."""
        return self._only.ablate_fraction

    @property
    def correlations(self) -> npt.NDArray[np.float64]:
        """Pearson's correlation per example at the only ablate fraction, (examples,)."""
        return self._only.correlations

    @property
    def spearman(self) -> npt.NDArray[np.float64]:
        """Spearman's correlation per example at the only ablate fraction, (examples,)."""
        return self._only.spearman

    @property
    def predicted(self) -> npt.NDArray[np.float32]:
        """Predicted outputs at the only ablate fraction, (rows, examples)."""
        return self._only.predicted

    @property
    def actual(self) -> npt.NDArray[np.float32]:
        """True outputs at the only ablate fraction, (rows, examples)."""
        return self._only.actual

    @property
    def _only(self) -> FractionEvaluation:
        if len(self.fractions) != 1:
            raise QueryError(
                f"This evaluation has several ablate fractions, {self._known}: choose one with at(...), or see table()."
            )
        return self.fractions[0]

    @property
    def _known(self) -> str:
        return ", ".join(f"{f.ablate_fraction:g}" for f in self.fractions)


def evaluate(
    attributions: Attributions,
    engine: Engine,
    examples: Examples | tuple[Any, ...] | Dataset[Any],
    *,
    rows: int = 200,
    ablate_fraction: float | Sequence[float] | None = None,
    seed: int = 1_000_003,
) -> Evaluation:
    """Returns the counterfactual correlation on keep-vectors drawn afresh, never those fitted. Mutates nothing.

    Where a fraction of few components ablates none of them in any row, outputs are constant and there is no
    correlation: NaN, counted by `FractionEvaluation.undefined`.

    Args:
      attributions: What is judged.
      engine: The same model, index, output and ablation.
      examples: All examples of the attributions, in their order: also a pair (inputs, targets), or a data set.
      rows: Number of fresh keep-vectors per ablate fraction.
      ablate_fraction: Share of components ablated, or several (`ABLATE_FRACTIONS` are customary); None: what the
        attributions were estimated at.
      seed: Must differ from that of the estimation.

    Cost: rows x examples forwards per fraction; predicted and true outputs of all fractions are kept, 8 bytes for each.

    Raises:
      QueryError: The campaign's seed, fewer than 2 rows, no fraction or the same one twice, or an engine or examples
        that the attributions are not about.
      KeepError: A fraction that is not between 0 and 1.
    """
    attributions.require_output_units("An evaluation")
    examples = Examples.of(examples, labelled=engine.output.needs_labels)
    _check_subject(attributions, engine, examples, rows, seed)
    fitted_at = attributions.header["identity"]["of"]["plan"]["ablate_fraction"]
    fractions = _as_fractions(fitted_at if ablate_fraction is None else ablate_fraction)
    plans = [KeepPlan(len(engine.index), rows, fraction, seed) for fraction in fractions]  # all checked before any runs
    _check_engine(attributions, engine, examples)
    found = []
    for fraction, plan in zip(fractions, plans, strict=True):
        keep = plan.take(0, rows)
        actual = engine.outputs(keep, examples).numpy().astype(np.float32, copy=False)
        found.append(FractionEvaluation.of(fraction, attributions.predict(keep), actual))
    return Evaluation(rows, seed, tuple(found))


def _as_fractions(given: float | Sequence[float]) -> list[float]:
    fractions = [float(f) for f in np.atleast_1d(np.asarray(given, dtype=np.float64))]
    if not fractions:
        raise QueryError("No ablate fraction given: pass one, several, or None for that of the attributions.")
    if len(set(fractions)) != len(fractions):
        raise QueryError(f"An ablate fraction is given twice: {', '.join(f'{f:g}' for f in fractions)}.")
    return fractions


def _check_subject(attributions: Attributions, engine: Engine, examples: Examples, rows: int, seed: int) -> None:
    """Raises QueryError unless these are fresh rows, of the model, output and examples of the attributions."""
    of = attributions.header["identity"]["of"]
    if seed == of["plan"]["seed"]:
        raise QueryError(f"seed={seed} is the one that these attributions were made with. Give another seed.")
    if rows < 2:
        raise QueryError(f"A correlation needs at least 2 keep-vectors, got rows={rows}.")
    if engine.index != attributions.index:
        raise QueryError(f"The engine has index {engine.index.hash[:12]}, the attributions {of['index'][:12]}.")
    if engine.output.name != output_name(of):
        raise QueryError(f"The engine's output is {engine.output.name}, the attributions are of {of['output']}.")
    if examples.hash != of["data"]:
        raise QueryError(
            f"These {len(examples):,} examples are not the {len(attributions):,} of the attributions (data hash "
            f"{examples.hash[:12]}, expected {of['data'][:12]}). Give all of them, in the campaign's order."
        )


def _check_engine(attributions: Attributions, engine: Engine, examples: Examples) -> None:
    """Raises QueryError, naming each key, unless the engine is of the model and ablation of the attributions."""
    found = engine_differences(attributions.header["identity"]["of"], engine, examples)
    if found:
        raise QueryError(
            f"The engine measures something else than the attributions are about. What differs (attributions -> "
            f"engine):\n{listed(found)}\nGive an engine of the same model, index, output and ablation."
        )
