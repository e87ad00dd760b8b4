"""Out-of-distribution penalties of an edited model, on its original task and on the task it was edited for.

Source: Brown et al., Robustness of edited neural networks (2023), Equations 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from coar.metrics.accuracies import Accuracy
from coar.metrics.checks import MetricError

Task = Literal["original", "editing"]


@dataclass(frozen=True)
class Penalty:
    """A difference of accuracies per cell (a shift, e.g. a corruption at a severity) and its mean. Negative = worse.

    Attributes:
      value: Mean over cells, each counted once.
      cells: The penalty of each cell.
      compared: Per cell (accuracy subtracted, accuracy of the edited model on the shifted data).
      expected: How many cells the benchmark has; equal to the number of cells where it is complete.
      task: `original` or `editing`.
      protocol: What was subtracted from what, in words.
    """

    value: float
    cells: Mapping[str, float]
    compared: Mapping[str, tuple[Accuracy, Accuracy]]
    expected: int
    task: Task
    protocol: str

    @property
    def complete(self) -> bool:
        """Whether every cell of the benchmark was there."""
        return len(self.cells) == self.expected

    def table(self) -> pd.DataFrame:
        """Returns one row per cell: cell, penalty, and the counts behind both accuracies."""
        return pd.DataFrame(
            {
                "cell": cell,
                "penalty": self.cells[cell],
                "subtracted": minus.value,
                "subtracted_right": minus.right,
                "subtracted_examples": minus.examples,
                "shifted": plus.value,
                "shifted_right": plus.right,
                "shifted_examples": plus.examples,
            }
            for cell, (minus, plus) in self.compared.items()
        )


def original_task_penalty(
    base: Mapping[str, Accuracy], edited: Mapping[str, Accuracy], expected: int | None = None
) -> Penalty:
    """Returns, per shift of the *original* task, accuracy of the edited minus that of the unedited model.

    The same data, two models: what an edit costs in robustness. Mutates nothing.

    Args:
      base, edited: Per cell, the accuracy of the unedited and of the edited model on the shifted data.
      expected: Cells of the benchmark (95 for ImageNet-C); None: those given.

    Source: Equation 6.
    """
    missing = sorted({*base} ^ {*edited})
    if missing:
        raise MetricError(f"Cell {missing[0]!r} is there for one model only. Judge both models on the same cells.")
    for cell in base:
        if base[cell].examples != edited[cell].examples:
            raise MetricError(
                f"Cell {cell!r} has {base[cell].examples} examples for the unedited model and {edited[cell].examples} "
                "for the edited one. Use the same ones."
            )
    compared = {cell: (base[cell], edited[cell]) for cell in base}
    what = "accuracy of the edited model minus accuracy of the unedited model, both on the same shifted original data"
    return _penalty("original", compared, expected, f"Original-task OOD penalty (Equation 6): {what}")


def editing_task_penalty(clean: Accuracy, shifted: Mapping[str, Accuracy], expected: int | None = None) -> Penalty:
    """Returns, per shift of the *editing* task, accuracy of the edited model there minus its accuracy without shift.

    The same model, two data sets: the unedited model does not enter, so this need not be 0 without an edit.

    Args:
      clean: Accuracy of the edited model on the editing task.
      shifted: Per cell, its accuracy on the shifted editing task.
      expected: Cells of the benchmark; None: those given.

    Source: Equation 7.
    """
    compared = {cell: (clean, value) for cell, value in shifted.items()}
    what = "accuracy of the edited model on shifted editing data minus its own accuracy on editing data without shift"
    return _penalty("editing", compared, expected, f"Editing-task OOD penalty (Equation 7): {what}")


def _penalty(task: Task, compared: Mapping[str, tuple[Accuracy, Accuracy]], expected: int | None, what: str) -> Penalty:
    if not compared:
        raise MetricError("There are no shifted data sets. Give at least one cell.")
    total = len(compared) if expected is None else expected
    if total < len(compared):
        raise MetricError(
            f"There are {len(compared)} cells but expected={expected}. Give the benchmark's number of cells."
        )
    cells = {cell: float(plus.exact - minus.exact) for cell, (minus, plus) in compared.items()}
    missing = (
        "" if total == len(cells) else f" {total - len(cells):,} cells are missing: not comparable with full means."
    )
    protocol = f"{what}; mean over {len(cells):,} of {total:,} cells, each counted once; negative = worse.{missing}"
    return Penalty(float(np.mean(list(cells.values()))), cells, dict(compared), total, task, protocol)
