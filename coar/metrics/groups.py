"""Accuracy per group of examples: the worst group, and averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy of one model on one set of examples.

    Attributes:
      average: Over examples.
      worst: Of the group with the lowest accuracy.
      worst_group: Its name; the first by name where several are lowest.
      group_average: Over groups, each counted once.
      groups: Accuracy per group.
      sizes: Examples per group.
    """

    average: float
    worst: float
    worst_group: str
    group_average: float
    groups: dict[str, float]
    sizes: dict[str, int]


def group_accuracy(correct: Sequence[bool] | Any, groups: Sequence[str]) -> GroupAccuracy:
    """Returns accuracies from which examples (examples,) bool are correct, and the group of each. Mutates nothing."""
    right = np.asarray(correct)
    if right.dtype != np.bool_ or right.shape != (len(groups),) or not len(groups):
        raise ValueError(f"correct is {right.dtype} of shape {right.shape}, expected bool ({len(groups)},), not empty.")
    table = pd.Series(right.astype(np.float64)).groupby(np.asarray(groups, dtype=object), sort=True)
    means = {str(name): float(value) for name, value in table.mean().items()}
    worst = min(means, key=lambda name: means[name])
    return GroupAccuracy(
        average=float(right.mean()),
        worst=means[worst],
        worst_group=worst,
        group_average=float(np.mean(list(means.values()))),
        groups=means,
        sizes={str(name): int(value) for name, value in table.size().items()},
    )
