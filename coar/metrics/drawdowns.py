"""Edit success and drawdown: does an edit hold for everything it is about, and what does everything else lose.

Source: Mitchell, Editing the behaviors of large pre-trained neural networks (lecture, 2022), and the three measures of
drawdown in the code of MEND, SERAC and ENN. Only predictions are needed here, so their variants on perplexity and KL
divergence, which need probabilities, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coar.metrics.checks import Floats, MetricError, Row, as_classes, metric_row, share
from coar.statistics import mean_interval


@dataclass(frozen=True, eq=False)
class EditSuccess:
    """Accuracy on all inputs an edit is about: the edited example and everything that asks for the same.

    Attributes:
      value: Mean over edits of the accuracy on the inputs in scope.
      right, predictions: Counts over all edits.
      per_edit: (edits,), accuracy of each.
      protocol: What was counted, in words.
    """

    value: float
    right: int
    predictions: int
    per_edit: Floats
    protocol: str

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Returns the bootstrap interval (low, high) over edits."""
        return mean_interval(self.per_edit, level, seed)

    def row(self) -> Row:
        """Returns metric, value, interval, counts and protocol, for a table."""
        return metric_row("edit success", self.value, self.right, self.predictions, self.interval(), self.protocol)


def edit_success(groups: Mapping[str, tuple[Any, Any]]) -> EditSuccess:
    """Returns the accuracy on inputs in scope, the edited example included. Mutates nothing.

    Args:
      groups: Per group (predictions, labels): predictions (edits, inputs in scope) integers, row e by the model of edit
        e; labels (inputs in scope,): what the edited model should predict.
    """
    per_edit: list[float] = []
    right = total = 0
    for name, (predictions, labels) in groups.items():
        truth = as_classes(f"Labels of group {name!r}", labels, None)
        correct = as_classes(f"Predictions of group {name!r}", predictions, None, len(truth)) == truth
        if not correct.size:
            raise MetricError(f"Group {name!r} has no edit or no input in scope. Leave it out.")
        per_edit += correct.mean(axis=1).tolist()
        right, total = right + int(correct.sum()), total + correct.size
    if not per_edit:
        raise MetricError("There are no edits. Give the predictions of at least one edit.")
    protocol = (
        f"Edit success: {right:,} of {total:,} predictions of inputs in scope (the edited example included) are as "
        f"asked; accuracy per edit, then mean over {len(per_edit):,} edits. A model that is not edited scores 0 only "
        "if it has all inputs in scope wrong."
    )
    return EditSuccess(float(np.mean(per_edit)), right, total, np.array(per_edit), protocol)


@dataclass(frozen=True, eq=False)
class Drawdown:
    """What inputs out of scope lose: 0 is best, 1 is worst; each variant under its own name.

    Attributes:
      accuracy_drop: Accuracy before minus accuracy after (MEND); negative where edits help.
      disagreement: 1 - agreement with the unedited model's predictions (SERAC); never negative.
      error_rise: Mean error rate after edits minus the unedited model's (ENN). For one set of examples this is the
        accuracy drop, computed from the other side.
      base_right: Of `examples`, right before.
      right, disagreeing: Of `predictions`, right after, and not as before.
      predictions: edits x examples.
      per_edit: (edits,), accuracy drop of each edit.
      protocol: What was counted, in words.
    """

    accuracy_drop: float
    disagreement: float
    error_rise: float
    base_right: int
    right: int
    disagreeing: int
    examples: int
    predictions: int
    per_edit: Floats
    protocol: str

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Returns the bootstrap interval (low, high) of the accuracy drop, over edits."""
        return mean_interval(self.per_edit, level, seed)

    def row(self) -> Row:
        """Returns metric, value (accuracy drop), interval, right predictions, all, and protocol, for a table."""
        name = "drawdown (accuracy drop)"
        return metric_row(name, self.accuracy_drop, self.right, self.predictions, self.interval(), self.protocol)


def drawdown(predictions: Any, base: Any, labels: Any) -> Drawdown:
    """Returns what edits cost on inputs out of scope, in three named variants. Mutates nothing.

    Args:
      predictions: (edits, examples) integers: row e by the model of edit e.
      base: (examples,) integers: the unedited model's predictions.
      labels: (examples,) integers.

    Returns:
      NaN for all variants where there are no examples. Where the unedited model is right on all, they are equal to each
      other and to 1 - locality.
    """
    truth = as_classes("Labels", labels, None)
    before = as_classes("Base predictions", base, len(truth))
    after = as_classes("Predictions", predictions, None, len(truth))
    if not len(after):
        raise MetricError("There are no edits. Give the predictions of at least one edit.")
    n, total = len(truth), after.size
    base_right, right, differing = (int(b.sum()) for b in (before == truth, after == truth, after != before))
    error_before, errors_after = (
        share(n - base_right, n),
        (after != truth).mean(axis=1) if n else np.full(len(after), np.nan),
    )
    protocol = (
        f"Drawdown on {n:,} inputs out of scope, mean over {len(after):,} edits, positive = worse. Accuracy drop: "
        f"{base_right:,} of {n:,} right before, {right:,} of {total:,} predictions right after. Disagreement: "
        f"{differing:,} of {total:,} predictions are not the unedited model's. Error rise: mean error rate after minus "
        "before."
    )
    return Drawdown(
        accuracy_drop=share(base_right, n) - share(right, total),
        disagreement=share(differing, total),
        error_rise=float(errors_after.mean()) - error_before,
        base_right=base_right,
        right=right,
        disagreeing=differing,
        examples=n,
        predictions=total,
        per_edit=errors_after - error_before,
        protocol=protocol,
    )
