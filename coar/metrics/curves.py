"""Interpolation curves: accuracies of an edit at many strengths alpha, and the choice of one of them.

Source of the curves: Brown et al., Robustness of edited neural networks (2023), Figures 2 to 7. Neither that paper nor
the code of PAINT has a rule for alpha; the two rules here are the toolkit's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pandas as pd

from coar.metrics.accuracies import Accuracy
from coar.metrics.admission import CAP, exact_number
from coar.metrics.checks import Floats, MetricError

Rule = Literal["mean", "cap"]
ROUNDING = 1e-9  # what second differences may be off by through floating point alone


@dataclass(frozen=True)
class AlphaChoice:
    """The strength a rule chooses.

    Attributes:
      alpha: The strength.
      position: Of the point on the curve.
      rule: `mean` or `cap`.
      original, edited: Accuracies there.
      protocol: How it was chosen, in words.
    """

    alpha: float
    position: int
    rule: Rule
    original: Accuracy
    edited: Accuracy
    protocol: str


@dataclass(frozen=True)
class InterpolationCurve:
    """Accuracies along alpha, from the original model (0) to the full edit (1).

    Attributes:
      alphas: Strictly increasing, from 0.
      columns: Per name, one accuracy per alpha; `original` (the original task) and `edited` (the task of the edit) must
        be there, others may, e.g. one per shift.
      protocol: What was counted, in words.
    """

    alphas: tuple[float, ...]
    columns: Mapping[str, tuple[Accuracy, ...]]
    protocol: str

    @classmethod
    def of(cls, alphas: Sequence[float], columns: Mapping[str, Sequence[Accuracy]]) -> InterpolationCurve:
        """Returns the curve through these points. Mutates nothing.

        Raises:
          MetricError: alphas that do not rise from 0, a missing column, or a column of another length or whose
            accuracies are on different numbers of examples.
        """
        grid = tuple(float(alpha) for alpha in alphas)
        if not grid or grid[0] != 0 or not np.isfinite(grid).all() or any(b <= a for a, b in itertools.pairwise(grid)):
            raise MetricError(f"alphas are {grid}, expected rising numbers that start at 0, the original model.")
        for name in ("original", "edited"):
            if name not in columns:
                raise MetricError(
                    f"There is no column {name!r}, only {', '.join(map(repr, columns)) or 'none'}. Give it."
                )
        for name, values in columns.items():
            sizes = sorted({value.examples for value in values})
            if len(values) != len(grid) or len(sizes) != 1 or not sizes[0]:
                raise MetricError(
                    f"Column {name!r} has {len(values)} accuracies on {sizes} examples, expected {len(grid)} (one per "
                    "alpha) on the same examples."
                )
        counted = ", ".join(f"{name} on {values[0].examples:,} examples" for name, values in columns.items())
        protocol = (
            f"Accuracy at {len(grid):,} strengths alpha from {grid[0]:g} (the original model) to {grid[-1]:g} (1 is "
            f"the full edit): {counted}; micro-average over examples."
        )
        return cls(grid, {name: tuple(values) for name, values in columns.items()}, protocol)

    def values(self, column: str) -> Floats:
        """Returns one column as numbers (alphas,) between 0 and 1. Raises MetricError for a name that is not there."""
        if column not in self.columns:
            raise MetricError(f"There is no column {column!r}. Known: {', '.join(map(repr, self.columns))}.")
        return np.array([accuracy.value for accuracy in self.columns[column]])

    def table(self) -> pd.DataFrame:
        """Returns one row per alpha: alpha, and per column the accuracy, right ones and examples."""
        found: dict[str, Any] = {"alpha": list(self.alphas)}
        for name, values in self.columns.items():
            found[name] = [value.value for value in values]
            found[f"{name}_right"] = [value.right for value in values]
            found[f"{name}_examples"] = [value.examples for value in values]
        return pd.DataFrame(found)

    def second_differences(self, column: str) -> Floats:
        """Returns the second differences of a column over alpha, (alphas - 2,): none positive = concave."""
        return second_differences(self.alphas, self.values(column))

    def share_above_chord(self) -> float:
        """Returns which share of the inner points lies on or above the straight line between the curve's two ends.

        In the plane of original (x) and edited (y) accuracy; 1 is what papers call a concave trade-off: at the same
        cost more is gained than by mixing the two models' predictions. NaN without inner points, or where both ends are
        the same.
        """
        pairs = zip(self.columns["original"], self.columns["edited"], strict=True)
        points = [(original.exact, edited.exact) for original, edited in pairs]
        (x0, y0), (x1, y1) = points[0], points[-1]
        if len(points) < 3 or (x0, y0) == (x1, y1):
            return float("nan")
        side = -1 if x1 < x0 or (x1 == x0 and y1 > y0) else 1  # on which hand "above" is, walking along the chord
        above = [side * ((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) >= 0 for x, y in points[1:-1]]
        return sum(above) / len(above)

    def choose(self, rule: Rule, cap: float = CAP) -> AlphaChoice:
        """Returns the strength a rule chooses; of equal ones the smaller. Use curves of validation examples only.

        Args:
          rule: `mean`: the largest mean of original and edited accuracy. `cap`: the largest edited accuracy where the
            original drops by at most `cap`; alpha = 0 always qualifies.
          cap: In percentage points.
        """
        original = [accuracy.exact for accuracy in self.columns["original"]]
        edited = [accuracy.exact for accuracy in self.columns["edited"]]
        if rule == "mean":
            worth: list[Fraction | None] = [(o + e) / 2 for o, e in zip(original, edited, strict=True)]
            why = "the largest mean of original and edited accuracy"
        elif rule == "cap":
            most = exact_number("cap", cap)
            worth = [e if 100 * (original[0] - o) <= most else None for o, e in zip(original, edited, strict=True)]
            why = f"the largest edited accuracy where the original drops by at most {cap:g} percentage points"
        else:
            raise MetricError(f"rule is {rule!r}, expected 'mean' or 'cap'.")
        allowed = [(value, -i) for i, value in enumerate(worth) if value is not None]
        position = -max(allowed)[1]
        protocol = (
            f"alpha = {self.alphas[position]:g} has {why}, of {len(allowed):,} admissible among {len(self.alphas):,} "
            "strengths; of equal ones the smaller; to be chosen on validation examples."
        )
        chosen = self.columns["original"][position], self.columns["edited"][position]
        return AlphaChoice(self.alphas[position], position, rule, *chosen, protocol)

    def check_ends(self, original: Mapping[str, Accuracy], edited: Mapping[str, Accuracy]) -> None:
        """Raises MetricError unless the ends are the original and the edited model, judged directly.

        Args:
          original, edited: Accuracies by column of the two models; `edited` is compared where the curve ends at alpha =
            1.
        """
        ends = [(0, original)] + ([(-1, edited)] if self.alphas[-1] == 1 else [])
        for position, direct in ends:
            for name, accuracy in direct.items():
                self.values(name)  # names a column that is not there
                found = self.columns[name][position]
                if found != accuracy:
                    raise MetricError(
                        f"At alpha = {self.alphas[position]:g} the curve has {found.right} of {found.examples} right "
                        f"in {name!r}, the model judged directly {accuracy.right} of {accuracy.examples}: the path "
                        "does not end in that model."
                    )


def second_differences(alphas: Sequence[float], values: Any) -> Floats:
    """Returns the second differences of values over alphas, (n - 2,), for any spacing. Mutates nothing.

    On an even grid of step h this is (v[i-1] - 2 v[i] + v[i+1]) / h². Concave: none above 0; convex: none below.
    """
    x, y = np.asarray(alphas, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or (np.diff(x) <= 0).any():
        raise MetricError(
            f"alphas have shape {x.shape} and values {y.shape}, expected rising alphas (n,) and one value each."
        )
    slopes = np.diff(y) / np.diff(x)
    return 2 * np.diff(slopes) / (x[2:] - x[:-2]) if len(x) > 2 else np.zeros(0)


def is_concave(alphas: Sequence[float], values: Any, tolerance: float = ROUNDING) -> bool:
    """Returns whether no second difference is above `tolerance`: the curve bends down everywhere, or is straight."""
    return bool((second_differences(alphas, values) <= tolerance).all())


def is_convex(alphas: Sequence[float], values: Any, tolerance: float = ROUNDING) -> bool:
    """Returns whether no second difference is below `-tolerance`, as a loss along the last linear layer must be."""
    return bool((second_differences(alphas, values) >= -tolerance).all())
