"""Percent of errors corrected, and what else an edit changed on the way.

Source: Santurkar et al., Editing a classifier by rewriting its prediction rules (arXiv 2112.01008), Equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from coar.metrics.checks import MetricError, as_bits, as_classes, share

Others = Literal["paper", "repository"]
OTHERS = ("paper", "repository")
CLIP = -100.0  # percent: the published code reports nothing below
CELLS = (
    ("target", "train style"),
    ("target", "held-out styles"),
    ("other", "train style"),
    ("other", "held-out styles"),
)


def percent_corrected(n_pre: int, n_post: int, clip: float | None = None) -> float:
    """Returns 100 (n_pre - n_post) / n_pre: 100 = all errors gone, negative = net harm; NaN without errors before.

    Args:
      n_pre, n_post: Errors before and after the edit, on the same examples; n_post counts new errors, too.
      clip: The least value to report; the published code has -100, the paper none (None).
    """
    if n_pre < 0 or n_post < 0:
        raise MetricError(f"There are {n_pre} errors before and {n_post} after, expected counts from 0 up.")
    if n_pre == 0:
        return float("nan")
    raw = 100.0 * (n_pre - n_post) / n_pre
    return raw if clip is None else max(raw, clip)


@dataclass(frozen=True)
class ErrorsCorrected:
    """Errors of a model before and after an edit, on the same examples.

    Attributes:
      percent: 100 (n_pre - n_post) / n_pre, not clipped; NaN without errors before.
      n_pre, n_post: Errors before and after.
      fixed, broken: Errors that went, and new ones; n_pre - n_post = fixed - broken.
      examples: How many were counted.
      protocol: What was counted, in words.
    """

    percent: float
    n_pre: int
    n_post: int
    fixed: int
    broken: int
    examples: int
    protocol: str

    def clipped(self, at: float = CLIP) -> float:
        """Returns the percent, but not less than `at`; -100 is what the published code does."""
        return percent_corrected(self.n_pre, self.n_post, at)


def errors_corrected(before: Any, after: Any, labels: Any, counted: Any = None) -> ErrorsCorrected:
    """Returns how many errors an edit corrects on transformed examples. Mutates nothing.

    Args:
      before, after: (examples,) integers: predictions of the unedited and of the edited model for the *transformed*
        examples.
      labels: (examples,) integers.
      counted: (examples,) bool: which count. Equation 2 counts those whose *original* the unedited model has right:
        `base_predictions_of_originals == labels`. None: all; say so beside the number.
    """
    truth = as_classes("Labels", labels, None)
    which = np.ones(len(truth), dtype=np.bool_) if counted is None else as_bits("Counted", counted, len(truth))
    wrong_before = (as_classes("Predictions before", before, len(truth)) != truth)[which]
    wrong_after = (as_classes("Predictions after", after, len(truth)) != truth)[which]
    over = "all examples given" if counted is None else "the examples that count"
    return _corrected(wrong_before, wrong_after, over)


def _corrected(wrong_before: Any, wrong_after: Any, over: str) -> ErrorsCorrected:
    n_pre, n_post = int(wrong_before.sum()), int(wrong_after.sum())
    fixed, broken = int((wrong_before & ~wrong_after).sum()), int((~wrong_before & wrong_after).sum())
    protocol = (
        f"Percent of errors corrected, 100 (N_pre - N_post) / N_pre over {over} ({len(wrong_before):,}): {n_pre:,} "
        f"errors before, {n_post:,} after, of which {broken:,} are new; {fixed:,} are fixed; not clipped; 100 = all "
        "gone, negative = net harm, NaN without errors before."
    )
    return ErrorsCorrected(percent_corrected(n_pre, n_post), n_pre, n_post, fixed, broken, len(wrong_before), protocol)


@dataclass(frozen=True)
class CorrectedCells:
    """Percent of errors corrected in four cells: target class and other classes, train style and held-out styles.

    Attributes:
      cells: By (class, style): class `target` or `other`, style `train style` or `held-out styles`.
      target: The class of the examples the edit was made with.
      others: `paper` or `repository`, see `errors_corrected_cells`.
      excluded: Examples left out, as they were used to edit.
      protocol: What was counted, in words.
    """

    cells: Mapping[tuple[str, str], ErrorsCorrected]
    target: int
    others: Others
    excluded: int
    protocol: str

    def table(self, clip: float | None = None) -> pd.DataFrame:
        """Returns one row per cell: classes, styles, percent (clipped if asked) and all counts."""
        return pd.DataFrame(
            {
                "classes": classes,
                "styles": styles,
                "percent": percent_corrected(cell.n_pre, cell.n_post, clip),
                "n_pre": cell.n_pre,
                "n_post": cell.n_post,
                "fixed": cell.fixed,
                "broken": cell.broken,
                "examples": cell.examples,
            }
            for (classes, styles), cell in self.cells.items()
        )


def errors_corrected_cells(
    clean: Any,
    before: Any,
    after: Any,
    labels: Any,
    target: int,
    held_out: Any,
    *,
    excluded: Any = None,
    others: Others = "paper",
) -> CorrectedCells:
    """Returns the percent of errors corrected for the target class and the others, by style. Mutates nothing.

    Args:
      clean: (examples,) integers: predictions of the unedited model for the *original* examples.
      before, after: (examples,) integers: predictions of the unedited and the edited model for the transformed ones.
      labels: (examples,) integers.
      target: The class of the examples the edit was made with.
      held_out: (examples,) bool: transformed in a style the edit has not seen.
      excluded: (examples,) bool: those the edit was made with; they are no test examples.
      others: `paper` counts other classes' examples whose original is right. `repository` is what the published code
        counts: everything that is not (target class and original right), so wrong originals of every class, too.
    """
    truth = as_classes("Labels", labels, None)
    if others not in OTHERS:
        raise MetricError(f"others is {others!r}, expected 'paper' or 'repository'.")
    n = len(truth)
    wrong_before = as_classes("Predictions before", before, n) != truth
    wrong_after = as_classes("Predictions after", after, n) != truth
    clean_right = as_classes("Predictions of originals", clean, n) == truth
    unseen = as_bits("Held-out", held_out, n)
    test = np.ones(n, dtype=np.bool_) if excluded is None else ~as_bits("Excluded", excluded, n)
    of_target = (truth == target) & clean_right
    of_other = (truth != target) & clean_right if others == "paper" else ~of_target
    rows = {"target": of_target, "other": of_other}
    styles = {"train style": ~unseen, "held-out styles": unseen}
    cells = {}
    for classes, style in CELLS:
        which = test & rows[classes] & styles[style]
        over = f"the {classes} examples in {style} ({_who(classes, target, others)})"
        cells[classes, style] = _corrected(wrong_before[which], wrong_after[which], over)
    used = n - int(test.sum())
    protocol = (
        f"Percent of errors corrected per cell. Target: class {target}, original predicted right by the unedited "
        f"model. Other: {_who('other', target, others)}. {used:,} examples the edit was made with are left out. "
        "Micro-average within a cell, not clipped."
    )
    return CorrectedCells(cells, int(target), others, used, protocol)


def _who(classes: str, target: int, others: Others) -> str:
    if classes == "target":
        return f"class {target}, original right"
    if others == "paper":
        return "other classes, original right"
    return "as in the published code: all but right originals of the target class, wrong originals included"


@dataclass(frozen=True)
class Outcomes:
    """What an edit did to examples: shares of all, that add up to 1, and counts.

    Attributes:
      corrected, unchanged, newly_wrong: Shares.
      n_corrected, n_unchanged, n_newly_wrong, examples: Counts.
      n_still_wrong: Of the unchanged, those wrong before and after (perhaps predicted as another class).
      protocol: What was counted, in words.
    """

    corrected: float
    unchanged: float
    newly_wrong: float
    n_corrected: int
    n_unchanged: int
    n_newly_wrong: int
    n_still_wrong: int
    examples: int
    protocol: str


def outcomes(before: Any, after: Any, labels: Any) -> Outcomes:
    """Returns which shares of examples an edit corrects, leaves, or makes wrong. All (examples,). Mutates nothing."""
    truth = as_classes("Labels", labels, None)
    was_right = as_classes("Predictions before", before, len(truth)) == truth
    is_right = as_classes("Predictions after", after, len(truth)) == truth
    corrected, newly_wrong = int((~was_right & is_right).sum()), int((was_right & ~is_right).sum())
    n, unchanged = len(truth), len(truth) - corrected - newly_wrong
    protocol = (
        f"Outcomes over all {n:,} examples: corrected = wrong before and right after ({corrected:,}), newly wrong = "
        f"right before and wrong after ({newly_wrong:,}), unchanged = as right or wrong as before ({unchanged:,})."
    )
    still = int((~was_right & ~is_right).sum())
    return Outcomes(
        corrected=share(corrected, n),
        unchanged=share(unchanged, n),
        newly_wrong=share(newly_wrong, n),
        n_corrected=corrected,
        n_unchanged=unchanged,
        n_newly_wrong=newly_wrong,
        n_still_wrong=still,
        examples=n,
        protocol=protocol,
    )
