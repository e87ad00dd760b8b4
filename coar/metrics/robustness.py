"""Effective robustness: accuracy under shift beyond what models of the same ordinary accuracy have.

Source: Taori et al., Measuring robustness to natural distribution shifts in image classification (2020): a line in
logits through baseline models. Where there are too few of those, the gap to a curve of one method's own models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coar.metrics.checks import Floats, MetricError, as_accuracies


@dataclass(frozen=True)
class Baseline:
    """The line `logit(ood) = slope logit(id) + intercept` through baseline models.

    Attributes:
      slope, intercept: By least squares.
      low, high: The range of the baseline models' ordinary accuracy; nothing is said outside.
      models: How many there are.
      examples: Ordinary and shifted examples of the accuracies; None: not said, and nothing is clipped.
      protocol: How it was fitted, in words.
    """

    slope: float
    intercept: float
    low: float
    high: float
    models: int
    examples: tuple[int, int] | None
    protocol: str

    def expected(self, id_accuracy: float) -> float:
        """Returns the accuracy under shift of a baseline model with this ordinary accuracy.

        Raises:
          MetricError: It is outside the baseline's range.
        """
        _require_inside(id_accuracy, self.low, self.high)
        n = None if self.examples is None else self.examples[0]
        x = _logit(_clipped("ID", np.array([id_accuracy]), n))[0]
        return float(1 / (1 + np.exp(-(self.slope * x + self.intercept))))


@dataclass(frozen=True)
class EffectiveRobustness:
    """Accuracy under shift minus what is expected at the same ordinary accuracy. Positive = more robust.

    Attributes:
      value: ood_accuracy - expected.
      id_accuracy, ood_accuracy: Of the model judged.
      expected: Of the baseline, at this ordinary accuracy.
      protocol: Against what, in words.
    """

    value: float
    id_accuracy: float
    ood_accuracy: float
    expected: float
    protocol: str


def fit_baseline(id_accuracies: Any, ood_accuracies: Any, examples: tuple[int, int] | None = None) -> Baseline:
    """Returns the line through baseline models in logits. Mutates nothing.

    Args:
      id_accuracies, ood_accuracies: (models,) each, between 0 and 1: on ordinary and on shifted data.
      examples: How many ordinary and shifted examples they were counted on. Accuracies are then clipped to
        [1 / 2n, 1 - 1 / 2n], as 0 and 1 have no logit.

    Raises:
      MetricError: Fewer than 2 models of different ordinary accuracy, or 0 or 1 without `examples`.
    """
    x, y = _models(id_accuracies, ood_accuracies)
    counts: tuple[int | None, int | None] = (None, None) if examples is None else examples
    lx, ly = (_logit(_clipped(name, v, n)) for name, v, n in zip(("ID", "OOD"), (x, y), counts, strict=True))
    slope, intercept = np.linalg.lstsq(np.stack([lx, np.ones_like(lx)], axis=1), ly, rcond=None)[0]
    clip = "" if examples is None else f", clipped to [1/2n, 1 - 1/2n] with n = {examples[0]:,} and {examples[1]:,}"
    protocol = (
        f"Baseline: logit(OOD accuracy) = {slope:.4g} logit(ID accuracy) + {intercept:.4g}, least squares through "
        f"{len(x):,} models with ID accuracy {x.min():.4g} to {x.max():.4g}{clip}."
    )
    return Baseline(float(slope), float(intercept), float(x.min()), float(x.max()), len(x), examples, protocol)


def effective_robustness(id_accuracy: float, ood_accuracy: float, baseline: Baseline) -> EffectiveRobustness:
    """Returns how much more accurate a model is under shift than the baseline at its ordinary accuracy.

    Raises:
      MetricError: Ordinary accuracy outside the baseline's range.
    """
    as_accuracies("Accuracies", [id_accuracy, ood_accuracy])
    expected = baseline.expected(id_accuracy)
    protocol = (
        f"Effective robustness: OOD accuracy {ood_accuracy:.4g} minus {expected:.4g}, what the baseline has at the "
        f"same ID accuracy {id_accuracy:.4g}; positive = more robust. {baseline.protocol}"
    )
    return EffectiveRobustness(ood_accuracy - expected, id_accuracy, ood_accuracy, expected, protocol)


def vertical_gap(
    id_accuracy: float, ood_accuracy: float, id_accuracies: Any, ood_accuracies: Any
) -> EffectiveRobustness:
    """Returns the gap to a curve of models at the same ordinary accuracy, read off between its points.

    For a baseline that is no line in logits, e.g. the points of one fine-tuning path. Mutates nothing.

    Args:
      id_accuracy, ood_accuracy: Of the model judged.
      id_accuracies, ood_accuracies: (models,) of the curve; points of one ordinary accuracy are averaged.

    Raises:
      MetricError: Ordinary accuracy outside the curve's range.
    """
    as_accuracies("Accuracies", [id_accuracy, ood_accuracy])
    x, y = _models(id_accuracies, ood_accuracies)
    _require_inside(id_accuracy, float(x.min()), float(x.max()))
    grid = np.unique(x)
    expected = float(np.interp(id_accuracy, grid, [y[x == value].mean() for value in grid]))
    protocol = (
        f"Vertical gap: OOD accuracy {ood_accuracy:.4g} minus {expected:.4g}, interpolated linearly between {len(x):,} "
        f"models at the same ID accuracy {id_accuracy:.4g}; positive = more robust; no fit in logits."
    )
    return EffectiveRobustness(ood_accuracy - expected, id_accuracy, ood_accuracy, expected, protocol)


def _models(id_accuracies: Any, ood_accuracies: Any) -> tuple[Floats, Floats]:
    x, y = as_accuracies("ID accuracies", id_accuracies), as_accuracies("OOD accuracies", ood_accuracies)
    if len(x) != len(y):
        raise MetricError(f"There are {len(x)} ID accuracies and {len(y)} OOD accuracies. Give both of each model.")
    if len(np.unique(x)) < 2:
        raise MetricError(
            f"A baseline needs at least 2 models of different ID accuracy, got {len(np.unique(x))}. Add models, e.g. "
            "the points of a fine-tuning path."
        )
    return x, y


def _clipped(name: str, values: Floats, examples: int | None) -> Floats:
    if examples is None:
        if ((values == 0) | (values == 1)).any():
            raise MetricError(
                f"An {name} accuracy is 0 or 1, which has no logit. Give examples=(ordinary, shifted), how many "
                "examples the accuracies were counted on; they are then clipped to [1/2n, 1 - 1/2n]."
            )
        return values
    if examples < 1:
        raise MetricError(f"examples has {examples} for {name}, expected how many examples there are: at least 1.")
    return np.clip(values, 1 / (2 * examples), 1 - 1 / (2 * examples))


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _require_inside(id_accuracy: float, low: float, high: float) -> None:
    if not low <= id_accuracy <= high:
        raise MetricError(
            f"ID accuracy {id_accuracy:.4g} is outside the baseline's range, {low:.4g} to {high:.4g}: what robustness "
            "is to be expected there is not known. Add baseline models of such accuracy."
        )
