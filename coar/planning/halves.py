"""What a network still does with a share of its components off, and how far a line could explain it: by measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ablate import Engine, Examples, KeepPlan, NonFiniteOutputError
from coar.statistics import correlation

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ROWS_SEED, HALVES_SEED = 0xF2AC, 0x4A1F  # rows are never those of a campaign or an evaluation with the same seed
ROUNDING = 1e-5  # a change of an output by less, beside its size or 1, is that of float32


@dataclass(frozen=True)
class FractionMeasure:
    """What was measured at one ablate fraction.

    Attributes:
      ablate_fraction: Share of components ablated.
      drops: What the outputs lost, f(full) - f(without A and B), (rows, examples).
      sums: [f(full) - f(without A)] + [f(full) - f(without B)], (rows, examples).
      kept: Whether the prediction is still right, (rows, examples right at first); None: not judged.
      scale: Size of the outputs, at least 1, (examples,).
      broken: Outputs were NaN or infinite; then there are no rows.
    """

    ablate_fraction: float
    drops: Floats
    sums: Floats
    kept: Bools | None
    scale: Floats
    broken: bool = False

    @property
    def rows(self) -> int:
        """Random keep-vectors."""
        return len(self.drops)

    @property
    def right_kept(self) -> float:
        """Share of the predictions right at first that stay right; NaN: not judged."""
        if self.broken:
            return 0.0
        return float(self.kept.mean()) if self.kept is not None else float("nan")

    @property
    def right_kept_error(self) -> float:
        """Standard error of `right_kept`, over rows."""
        return 0.0 if self.broken or self.kept is None else _error(self.kept.mean(axis=1))

    @property
    def mean_drop(self) -> float:
        """Mean loss of the output, in its units."""
        return float(self.drops.mean()) if self.rows else float("nan")

    @property
    def sd(self) -> float:
        """Standard deviation of an example's outputs over rows, mean over examples."""
        return float(self.drops.std(axis=0).mean()) if self.rows else float("nan")

    @property
    def halves(self) -> float:
        """Correlation c of what A and B do together with what they do one by one, mean over examples: 1 for a line.

        What any linear attribution can reach at most. NaN: no output changed.
        """
        return self._correlation(np.ones(self.rows, dtype=np.bool_))

    @property
    def halves_error(self) -> float:
        """Standard error of `halves`, over rows, by the jackknife."""
        if self.rows < 3:
            return float("nan")
        without = np.array([self._correlation(np.arange(self.rows) != i) for i in range(self.rows)])
        return float(np.sqrt((self.rows - 1) * without.var()))

    def _correlation(self, rows: Bools) -> float:
        drops, sums = self.drops[rows], self.sums[rows]
        if len(drops) < 2:
            return float("nan")
        moved = np.ptp(drops, axis=0) > ROUNDING * self.scale
        found = correlation(drops[:, moved], sums[:, moved])
        return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def _error(values: Floats) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


class HalvesMeter:
    """Measures a network at one ablate fraction after another, with the same keep-vectors as far as they go.

    Row i of a larger fraction ablates what row i of a smaller one does, and more: fractions are compared on the same
    ground. What is ablated is split at random into A and B.

    Args:
      engine: Runs the model under its output.
      margins: An engine of the same model for the margin, where the output is none; None: `engine` has it.
      examples: What is run.
      judge: Whether a margin above 0 is a right prediction; else predictions are not judged.
      seed: Of the keep-vectors.
    """

    def __init__(self, engine: Engine, margins: Engine | None, examples: Examples, judge: bool, seed: int) -> None:
        self._engine, self._margins, self._examples, self._seed = engine, margins, examples, seed
        self.forwards = 0
        nothing = np.ones((1, len(engine.index)), dtype=np.bool_)
        self._full = self._run(engine, nothing)[0]
        self.right: Bools | None = None
        if judge:
            self.right = (self._full if margins is None else self._run(margins, nothing)[0]) > 0

    def measure(self, ablate_fraction: float, rows: int, start: int = 0) -> FractionMeasure:
        """Returns what rows `start` to `rows` - 1 say. Cost: three forwards a row, four with an engine for margins."""
        components = len(self._engine.index)
        both = KeepPlan(components, rows, ablate_fraction, self._seed ^ ROWS_SEED).take(start, rows)
        first = KeepPlan(components, rows, 0.5, self._seed ^ HALVES_SEED).take(start, rows)
        scale = np.maximum(1.0, np.abs(self._full))
        try:
            ablated = [self._run(self._engine, keep) for keep in (both, both | first, both | ~first)]
            margins = ablated[0] if self._margins is None else self._run(self._margins, both)
        except NonFiniteOutputError:
            none = np.empty((0, len(scale)))
            return FractionMeasure(ablate_fraction, none, none, None, scale, broken=True)
        kept = None if self.right is None or not self.right.any() else margins[:, self.right] > 0
        drops = self._full - ablated[0]
        return FractionMeasure(ablate_fraction, drops, 2 * self._full - ablated[1] - ablated[2], kept, scale)

    def extend(self, found: FractionMeasure, rows: int) -> FractionMeasure:
        """Returns the measurement with so many rows in all; only the new ones are run."""
        if found.broken or rows <= found.rows:
            return found
        more = self.measure(found.ablate_fraction, rows, found.rows)
        if more.broken:
            return more
        drops, sums = (np.concatenate(pair) for pair in ((found.drops, more.drops), (found.sums, more.sums)))
        kept = None if found.kept is None or more.kept is None else np.concatenate([found.kept, more.kept])
        return replace(found, drops=drops, sums=sums, kept=kept)

    def _run(self, engine: Engine, keep: Bools) -> Floats:
        self.forwards += len(keep)
        found: Floats = engine.outputs(keep, self._examples).numpy().astype(np.float64)
        return found
