"""Choosing a setting of a method under a cap on what it may cost on ordinary examples.

Source: Santurkar et al. (arXiv 2112.01008), Section 4.2: a setting is admissible if accuracy drops by at most 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pandas as pd

from coar.metrics.accuracies import Accuracy
from coar.metrics.checks import MetricError

CAP = 0.25  # percentage points: 125 of 50,000


@dataclass(frozen=True)
class Setting:
    """One setting of a method, tried.

    Attributes:
      name: What a reader recognises it by, e.g. "layer 10, rate 1e-4, 400 steps".
      score: What is to be large, on *validation* examples: e.g. percent of errors corrected. NaN: not defined.
      clean: Accuracy of the edited model on ordinary examples.
    """

    name: str
    score: float
    clean: Accuracy


@dataclass(frozen=True)
class Choice:
    """The best admissible setting, or none.

    Attributes:
      chosen: Its name; None: no edit.
      score: Its score; 0 for no edit.
      no_edit: True where no setting is admissible (or none has a score): the unedited model is kept.
      cap: Percentage points.
      table: One row per setting: setting, score, drop (percentage points, positive = worse), right, examples,
        admissible.
      protocol: How it was chosen, in words.
    """

    chosen: str | None
    score: float
    no_edit: bool
    cap: float
    protocol: str
    table: pd.DataFrame = field(repr=False, compare=False)


def accuracy_drop(base: Accuracy, edited: Accuracy) -> float:
    """Returns the drop of accuracy in percentage points; negative where the edited model is better."""
    return float(100 * (base.exact - edited.exact))


def is_admissible(base: Accuracy, edited: Accuracy, cap: float = CAP) -> bool:
    """Returns whether accuracy drops by at most `cap` percentage points; exactly, so 125 of 50,000 are 0.25."""
    return 100 * (base.exact - edited.exact) <= exact_number("cap", cap)


def choose_setting(settings: Sequence[Setting], base: Accuracy, cap: float = CAP) -> Choice:
    """Returns the admissible setting with the highest score; the first of equal ones. Mutates nothing.

    Args:
      settings: Those tried, each with its score on validation examples.
      base: Accuracy of the unedited model on the same ordinary examples.
      cap: What accuracy there may drop, in percentage points.

    Raises:
      MetricError: No settings, two of one name, or accuracies on another number of examples than the base's.
    """
    if not settings:
        raise MetricError("There are no settings to choose from. Give at least one.")
    names = [setting.name for setting in settings]
    if len(set(names)) != len(names):
        again = next(name for name in names if names.count(name) > 1)
        raise MetricError(f"Two settings are called {again!r}. Give each its own name.")
    for setting in settings:
        if setting.clean.examples != base.examples:
            raise MetricError(
                f"Setting {setting.name!r} was judged on {setting.clean.examples} ordinary examples, the unedited "
                f"model on {base.examples}. Use the same ones."
            )
    admitted = [is_admissible(base, setting.clean, cap) for setting in settings]
    open_to = [s for s, ok in zip(settings, admitted, strict=True) if ok and not math.isnan(s.score)]
    best = max(open_to, key=lambda setting: setting.score) if open_to else None
    table = pd.DataFrame(
        {
            "setting": setting.name,
            "score": setting.score,
            "drop": accuracy_drop(base, setting.clean),
            "right": setting.clean.right,
            "examples": setting.clean.examples,
            "admissible": ok,
        }
        for setting, ok in zip(settings, admitted, strict=True)
    )
    result = "none has a score, so there is no edit and the score is 0" if best is None else f"best is {best.name!r}"
    protocol = (
        f"Of {len(settings):,} settings {sum(admitted):,} are admissible (accuracy on {base.examples:,} ordinary "
        f"examples drops by at most {cap:g} percentage points from {100 * base.value:.2f} %); of these {result}; "
        "chosen by the score on validation examples."
    )
    return Choice(best.name if best else None, best.score if best else 0.0, best is None, cap, protocol, table)


def sweep_caps(settings: Sequence[Setting], base: Accuracy, caps: Sequence[float]) -> pd.DataFrame:
    """Returns what is chosen under each cap, one row each. Mutates nothing.

    Columns: cap, chosen (missing where there is no edit), score, no_edit.
    """
    choices = [choose_setting(settings, base, cap) for cap in caps]
    return pd.DataFrame(
        {"cap": choice.cap, "chosen": choice.chosen, "score": choice.score, "no_edit": choice.no_edit}
        for choice in choices
    )


def exact_number(name: str, value: float) -> Fraction:
    """Returns a number as it is written (0.1 is a tenth), for comparisons that must not round.

    Raises:
      MetricError: NaN, infinite or negative.
    """
    if not math.isfinite(value) or value < 0:
        raise MetricError(f"{name} is {value}, expected a number from 0 up, in percentage points.")
    return Fraction(repr(float(value)))
