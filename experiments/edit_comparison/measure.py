"""What edits do on the sets of a case: rows of a table, and the choice of a setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ablate import Examples
from coar.editing.edits.edit import Edit
from coar.editing.judging.evaluate import SetReport, evaluate_edit
from coar.editing.predicting import predictions
from coar.metrics import Accuracy, Setting, choose_setting, errors_corrected
from experiments.edit_comparison.tasks import Case, Pairs, Split, Task, corrupted_versions

Row = dict[str, Any]
Predictions = dict[str, npt.NDArray[np.integer[Any]]]
ORDINARY, LOCALITY, UNEDITED = "ordinary", "locality", "unedited"


class Judge:
    """Judges edits of one split; the unedited model's predictions are made once per set.

    Args:
      model: The unedited model.
      task: Its task.
      split: Validation or test.
      shifted: Judge under corruptions, too.
    """

    def __init__(self, model: nn.Module, task: Task, split: Split, shifted: bool) -> None:
        self.model, self.task, self.split, self.shifted = model, task, split, shifted
        self._known: dict[int, npt.NDArray[np.integer[Any]]] = {}
        self._ordinary = {ORDINARY: split.ordinary}
        if split.locality is not split.ordinary:
            self._ordinary[LOCALITY] = split.locality
        if shifted:
            self._ordinary |= _shifted(ORDINARY, split.ordinary)
        self._sets: dict[int, dict[str, Examples]] = {}

    def rows(self, case: Case, edit: Edit | None) -> list[Row]:
        """Returns one row per set of the case and per ordinary set; None: no edit."""
        sets = self._of(case)
        base: Predictions = {name: self._base(examples) for name, examples in sets.items()}
        if edit is None:
            return [self._row(case, name, base[name], base[name]) for name in sets]
        report = evaluate_edit(self.model, edit, sets, base=base, batch_size=256)
        return [self._row(case, name, base[name], _after(report.sets[name])) for name in sets]

    def _of(self, case: Case) -> dict[str, Examples]:
        if id(case) not in self._sets:
            sets = {name: pairs.examples for name, pairs in case.sets.items()}
            if self.shifted:
                sets |= _shifted(self.task.success, sets[self.task.success])
            self._sets[id(case)] = {**sets, **self._ordinary}
        return self._sets[id(case)]

    def _base(self, examples: Examples) -> npt.NDArray[np.integer[Any]]:
        if id(examples) not in self._known:
            self._known[id(examples)] = predictions(self.model, examples, batch_size=256)
        return self._known[id(examples)]

    def _row(self, case: Case, name: str, before: npt.NDArray[Any], after: npt.NDArray[Any]) -> Row:
        labels = self._of(case)[name].targets.numpy()
        row: Row = {
            "case": case.name,
            "set": name,
            "examples": len(labels),
            "right_before": int((before == labels).sum()),
            "right_after": int((after == labels).sum()),
            "fixed": int(((before != labels) & (after == labels)).sum()),
            "broken": int(((before == labels) & (after != labels)).sum()),
            "agreeing": int((before == after).sum()),
        }
        originals = case.sets[name].originals if name in case.sets else None
        if originals is not None:  # errors corrected count images whose original the unedited model gets right
            clean = self._clean(case.sets[name], originals) == labels
            counted = errors_corrected(before, after, labels, clean)
            row |= {"n_pre": counted.n_pre, "n_post": counted.n_post}
        return row

    def _clean(self, pairs: Pairs, originals: Any) -> npt.NDArray[np.integer[Any]]:
        key = id(pairs)
        if key not in self._known:
            examples = Examples(originals, pairs.examples.targets, pairs.examples.ids)
            self._known[key] = predictions(self.model, examples, batch_size=256)
        return self._known[key]


def _after(report: SetReport) -> npt.NDArray[np.integer[Any]]:
    after: npt.NDArray[np.integer[Any]] = report.kept.edited[0]
    return after


def _shifted(name: str, examples: Examples) -> dict[str, Examples]:
    return {f"{name}, {corruption}": version for corruption, version in corrupted_versions(examples).items()}


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Returns one row per case name and set, counts added up over edits: single-example edits of a group."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["case"], row["set"]
        if key not in found:
            found[key] = {**row, "edits": 1}
            continue
        kept = found[key]
        kept["edits"] += 1
        for name, value in row.items():
            if name not in ("case", "set"):
                kept[name] += value
    return list(found.values())


def chosen_setting(
    names: Sequence[str], rows_of: Callable[[str], list[Row] | None], first: str, cap: float
) -> tuple[str | None, str]:
    """Returns the admissible setting with the highest accuracy on `first`, and the protocol.

    None: no setting is admissible, or none is better there than the unedited model.

    Args:
      names: Of the settings.
      rows_of: Rows on validation images of a setting; None where the method failed.
      first: The set that counts; its accuracy is averaged over cases.
      cap: What accuracy on ordinary images may drop, in percentage points.
    """
    tried: list[Setting] = []
    base = Accuracy(0, 0)
    for name in names:
        rows = rows_of(name)
        if rows is None:
            continue
        ordinary = [row for row in rows if row["set"] == ORDINARY]
        total = sum(row["examples"] for row in ordinary)
        base = Accuracy(sum(row["right_before"] for row in ordinary), total)
        if not tried:  # of equal scores the first is taken
            tried.append(Setting(UNEDITED, _score(rows, first, "right_before"), base))
        clean = Accuracy(sum(row["right_after"] for row in ordinary), total)
        tried.append(Setting(name, _score(rows, first, "right_after"), clean))
    if not tried:
        return None, "Every setting failed."
    choice = choose_setting(tried, base, cap)
    return None if choice.chosen == UNEDITED else choice.chosen, choice.protocol


def _score(rows: Sequence[Row], first: str, right: str) -> float:
    scores = [row[right] / row["examples"] for row in rows if row["set"] == first]
    return math.fsum(scores) / len(scores)


def edit_facts(edit: Edit) -> Mapping[str, Any]:
    """Returns how an edit was found: steps, seconds, why it stopped, its strength."""
    log = edit.details.get("log", {})
    return {
        "steps": int(log.get("steps", 0)),
        "seconds": float(log.get("seconds", 0.0)),
        "stop": str(log.get("stop", "")),
        "alpha": float(edit.alpha),
        "components": len(edit.selection),
    }
