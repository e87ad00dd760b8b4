"""How many components COAR-Edit ablates: judged on validation examples, or until the targets are as they should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate import Engine, Examples
from coar.editing.coar_edit.ranking import Direction, Ranking
from coar.editing.log import EditLog
from coar.errors import EditError
from coar.metrics import Accuracy, Setting, choose_setting, group_accuracy, is_admissible

Criterion = Literal["accuracy", "margin", "worst_group"]
NO_CAP = 100.0  # percentage points: any drop is admissible

Margins = npt.NDArray[np.floating]


@dataclass(frozen=True)
class SizeChoice:
    """How many components to ablate.

    Attributes:
      k: 0: none, because no size that was tried is better than the unedited model.
      stopped: Why no larger size was tried.
      protocol: How it was chosen, in words.
      table: One row per size tried, from 0: k, score, and what it was made of.
    """

    k: int
    stopped: str
    protocol: str
    table: pd.DataFrame = field(repr=False, compare=False)


@dataclass(frozen=True)
class SizeRule:
    """Which size is best, and when to stop trying.

    Attributes:
      criterion: What is to be large, on validation examples: `accuracy` or mean `margin` of those to be changed, or the
        accuracy of the `worst_group` of all.
      cap: What accuracy on ordinary validation examples may drop, in percentage points; None: no cap.
      every: Step between the sizes that are tried.
      most: The largest size.
      patience: Stop after so many sizes in a row that are not admissible or not better.
    """

    criterion: Criterion
    cap: float | None
    every: int
    most: int
    patience: int


def choose_size(
    ranking: Ranking, engine: Engine, changed: Examples, ordinary: Examples, rule: SizeRule, log: EditLog
) -> SizeChoice:
    """Returns the size with the best criterion among those that keep ordinary accuracy; the smallest of equal ones.

    Args:
      ranking: What is ablated first.
      engine: The unedited model, with output `margin`.
      changed: Validation examples whose predictions should change, with the labels they should get (or lose, if the
        ranking's direction is `lower`).
      ordinary: Validation examples whose predictions should stay.
      rule: The criterion.
      log: Shows progress.

    Cost: one forward pass over both sets per size tried.
    """
    ranking.require_engine(engine, changed)
    groups = [*(f"changed {g}" for g in changed.groups), *(f"ordinary {g}" for g in ordinary.groups)]
    cap = NO_CAP if rule.cap is None else rule.cap
    rows: list[dict[str, float]] = []
    settings: list[Setting] = []
    since, stopped = 0, "every size up to the largest was tried"
    best = -math.inf
    sizes = _sizes(ranking, rule.every, rule.most)
    with log.progress(len(sizes), "size of the edit") as bar:
        for k in sizes:
            margins = engine.outputs(ranking.keep(k)[None], changed)[0].numpy()
            others = engine.outputs(ranking.keep(k)[None], ordinary)[0].numpy()
            row = _row(k, margins, others, ranking.direction, groups)
            clean = Accuracy(int(_right(others).sum()), len(others))
            settings.append(Setting(_name(k), row[rule.criterion], clean))
            rows.append({"k": k, "score": row[rule.criterion], **row})
            admissible = is_admissible(settings[0].clean, clean, cap)
            bar.update(1)
            if admissible and row[rule.criterion] > best:
                best, since = row[rule.criterion], 0
            else:
                since += 1
            if since >= rule.patience:
                stopped = f"{rule.patience} sizes in a row were not better, or dropped more than the cap"
                break
    choice = choose_setting(settings, settings[0].clean, cap)
    table = pd.DataFrame(rows).assign(admissible=choice.table["admissible"])
    protocol = (
        f"Sizes from 0 in steps of {rule.every}; score: {_words(rule.criterion, ranking.direction)}. {choice.protocol}"
    )
    k = next(size for size in sizes if _name(size) == choice.chosen)
    return SizeChoice(k, stopped, protocol, table)


def size_for_target(ranking: Ranking, engine: Engine, target: Examples, most: int, log: EditLog) -> SizeChoice:
    """Returns the smallest size at which the margin of every target is above 0 (direction `lower`: below 0).

    One component after the other, as in the COAR paper's study of model errors. k is 0 where that is so from the
    start.

    Raises:
      EditError: It is not reached within `most` components.
    """
    ranking.require_engine(engine, target)
    sizes = _sizes(ranking, 1, most)
    rows: list[dict[str, float]] = []
    sign = 1 if ranking.direction == "raise" else -1
    with log.progress(len(sizes), "size of the edit") as bar:
        for k in sizes:
            margins = sign * engine.outputs(ranking.keep(k)[None], target)[0].numpy()
            rows.append({"k": k, "score": float(margins.min()), "margin": sign * float(margins.mean())})
            bar.update(1)
            if (margins > 0).all():
                wanted = "above 0" if sign > 0 else "below 0"
                protocol = (
                    f"Components are ablated one after the other until the margin of all {len(target):,} targets is "
                    f"{wanted}: {k} components. These targets chose the size, so their success says nothing more."
                )
                return SizeChoice(k, "the targets are as they should be", protocol, pd.DataFrame(rows))
    best = max(rows, key=lambda row: row["score"])
    raise EditError(
        f"With {sizes[-1]} components ablated the targets are still not as they should be: at best, with {best['k']}, "
        f"the worst of their margins is {sign * best['score']:+.3f}. Allow more (most), rank with more reference "
        "examples or more exact attributions, or give fewer targets."
    )


def _sizes(ranking: Ranking, every: int, most: int) -> list[int]:
    return list(range(0, min(most, len(ranking.ids)) + 1, every))


def _name(k: int) -> str:
    return f"k = {k}"


def _row(k: int, margins: Margins, others: Margins, direction: Direction, groups: list[str]) -> dict[str, float]:
    """Returns every criterion and what is reported beside it; large is good."""
    lower = direction == "lower"
    as_asked = ~_right(margins) if lower else _right(margins)
    right = _right(others)
    worst = group_accuracy(np.concatenate([as_asked, right]), groups).worst
    return {
        "accuracy": float(as_asked.mean()),
        "margin": float(-margins.mean() if lower else margins.mean()),
        "worst_group": worst,
        "ordinary_accuracy": float(right.mean()),
        "ordinary_margin": float(others.mean()),
    }


def _right(margins: Margins) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = margins > 0
    return found


def _words(criterion: Criterion, direction: Direction) -> str:
    if criterion == "worst_group":
        return "accuracy of the worst group of all validation examples"
    if criterion == "margin":
        return "mean margin of the examples to be changed" + (", negated" if direction == "lower" else "")
    what = "no longer predicted as their label" if direction == "lower" else "predicted as asked"
    return f"share of the examples to be changed that is {what}"
