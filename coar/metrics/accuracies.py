"""Accuracy as a count: how many of how many examples are right."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from coar.metrics.checks import MetricError, as_classes, share


@dataclass(frozen=True)
class Accuracy:
    """How many of some examples a model predicts right.

    Attributes:
      right: Examples whose prediction is their label.
      examples: All examples.
    """

    right: int
    examples: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.examples:
            raise MetricError(f"{self.right} of {self.examples} examples are right, expected 0 to {self.examples}.")

    def __repr__(self) -> str:
        return f"<Accuracy: {self.right:,} of {self.examples:,} right, {100 * self.value:.2f} %>"

    @property
    def value(self) -> float:
        """The share that is right, from 0 to 1; NaN without examples."""
        return share(self.right, self.examples)

    @property
    def exact(self) -> Fraction:
        """The value as a fraction: comparisons of it do not round. Raises MetricError without examples."""
        if not self.examples:
            raise MetricError("There is no accuracy on 0 examples. Give at least one example.")
        return Fraction(self.right, self.examples)


def accuracy(predictions: Any, labels: Any) -> Accuracy:
    """Returns how many predictions (examples,) are the label (examples,); both integers. Mutates nothing."""
    truth = as_classes("Labels", labels, None)
    predicted = as_classes("Predictions", predictions, len(truth))
    return Accuracy(int((predicted == truth).sum()), len(truth))
