"""Judging edits: predictions before and after, on named sets of examples, kept so that any metric can be computed.

Metrics of the predictions are in `coar.metrics`; nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import pandas as pd
from torch import nn

from ablate import Examples
from ablate.logits import OutputKey
from coar.editing.edits.edit import Edit
from coar.editing.given import ExamplesLike, named_sets
from coar.editing.judging.edit_predictions import KeptPredictions
from coar.editing.predicting import Integers, predictions
from coar.editing.running import BATCH
from coar.errors import EditError
from coar.metrics.accuracies import Accuracy
from coar.metrics.corrected import Outcomes, outcomes


class Applicable(Protocol):
    """What can be judged: an `Edit`, or anything else that edits a model for the time of a `with` block."""

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Gives the edited model; restores the given one at the end."""


@dataclass(frozen=True, eq=False)
class SetReport:
    """What an edit does on one set of examples.

    Attributes:
      before, after: Accuracy of the unedited and of the edited model.
      fixed, broken: Examples that became right, and wrong.
      agreeing: Examples predicted as before, rightly or wrongly.
      kept: The predictions; `edited` has one row.
      protocol: What was counted, in words.
    """

    before: Accuracy
    after: Accuracy
    fixed: int
    broken: int
    agreeing: int
    kept: KeptPredictions
    protocol: str

    @property
    def agreement(self) -> float:
        """Share of examples predicted as before."""
        return self.agreeing / len(self.kept)

    def outcomes(self) -> Outcomes:
        """Returns the shares corrected, unchanged and newly wrong."""
        return outcomes(self.kept.base, self.kept.edited[0], self.kept.labels)


@dataclass(frozen=True, eq=False)
class EditReport:
    """What an edit does, on named sets of examples.

    Attributes:
      edit: The edit, in words.
      sets: Per set.
    """

    edit: str
    sets: Mapping[str, SetReport]

    def __repr__(self) -> str:
        changes = "; ".join(
            f"{name} {100 * s.before.value:.1f} -> {100 * s.after.value:.1f} %" for name, s in self.sets.items()
        )
        return f"<EditReport: {changes}>"

    @property
    def base(self) -> dict[str, Integers]:
        """The unedited model's predictions per set, to be given to the next `evaluate_edit`."""
        return {name: report.kept.base for name, report in self.sets.items()}

    def table(self) -> pd.DataFrame:
        """Returns one row per set: set, before, after (accuracies), fixed, broken, agreement, counts, protocol."""
        return pd.DataFrame(
            {
                "set": name,
                "before": report.before.value,
                "after": report.after.value,
                "agreement": report.agreement,
                "right_before": report.before.right,
                "right_after": report.after.right,
                "fixed": report.fixed,
                "broken": report.broken,
                "agreeing": report.agreeing,
                "examples": len(report.kept),
                "protocol": report.protocol,
            }
            for name, report in self.sets.items()
        )


def evaluate_edit(
    model: nn.Module,
    edit: Applicable,
    sets: Mapping[str, ExamplesLike],
    *,
    batch_size: int = BATCH,
    output_key: OutputKey = None,
    base: Mapping[str, Integers] | None = None,
    any_weights: bool = False,
) -> EditReport:
    """Returns accuracy before and after an edit on each set, with what it fixes and breaks. The model is unchanged.

    Args:
      model: The unedited model, in eval mode.
      edit: What is judged.
      sets: Examples, (inputs, targets) or data sets by name, e.g. target, other classes, ordinary ones.
      batch_size: Examples per forward pass.
      output_key: Where in what the model returns the logits are, as for `ablate.Engine`.
      base: Predictions of the unedited model by set, where they are known (of an earlier report: `EditReport.base`).
      any_weights: Judge it also on a model with other weights than the one it was made for; see `Edit.apply`.

    Cost: two passes over all sets; one where `base` is given.

    Raises:
      EditError: No sets, or what `predictions` raises.
    """
    sets = named_sets(sets, "sets")
    if not sets:
        raise EditError("There are no sets to judge the edit on. Give at least one, by name.")
    predict = Predicting(batch_size, output_key)
    if not set(sets) <= set(base or {}):  # what is known was predicted by a model that was checked
        predict.check(model, next(iter(sets.values())))
    before = unedited_predictions(model, sets, predict, base)
    with applied_to(edit, model, any_weights) as edited:
        after = {name: predict(edited, examples) for name, examples in sets.items()}
    return EditReport(repr(edit), {name: _report(sets[name], before[name], after[name]) for name in sets})


def applied_to(edit: Applicable, model: nn.Module, any_weights: bool) -> AbstractContextManager[nn.Module]:
    """Applies an edit; only an `Edit` knows about the weights that it was made for."""
    return edit.applied(model, any_weights=any_weights) if isinstance(edit, Edit) else edit.applied(model)


@dataclass(frozen=True)
class Predicting:
    """How models are run: `predictions` with these settings."""

    batch_size: int
    output_key: OutputKey

    def __call__(self, model: nn.Module, examples: Examples) -> Integers:
        """Returns the predictions of a model that was checked."""
        return predictions(model, examples, batch_size=self.batch_size, output_key=self.output_key, check=False)

    def check(self, model: nn.Module, examples: Examples) -> None:
        """Checks a model once, on two examples, before it predicts many sets with and without edits."""
        two = examples.take(range(min(2, len(examples))))
        predictions(model, two, batch_size=self.batch_size, output_key=self.output_key)


def unedited_predictions(
    model: nn.Module, sets: Mapping[str, Examples], predict: Predicting, known: Mapping[str, Integers] | None
) -> dict[str, Integers]:
    """Returns the unedited model's predictions per set, computed where they are not known."""
    found: dict[str, Integers] = {}
    for name, examples in sets.items():
        given = None if known is None else known.get(name)
        if given is not None and len(given) != len(examples):
            raise EditError(f"base has {len(given)} predictions for set {name!r}, which has {len(examples)} examples.")
        found[name] = predict(model, examples) if given is None else given
    return found


def _report(examples: Examples, before: Integers, after: Integers) -> SetReport:
    kept = KeptPredictions(examples.ids, examples.targets.numpy(), before, after[None])
    was, now = kept.base == kept.labels, kept.edited[0] == kept.labels
    fixed, broken = int((~was & now).sum()), int((was & ~now).sum())
    agreeing = int((kept.base == kept.edited[0]).sum())
    n = len(kept)
    protocol = (
        f"Of {n:,} examples {int(was.sum()):,} are predicted right by the unedited and {int(now.sum()):,} by the "
        f"edited model: {fixed:,} fixed, {broken:,} broken; {agreeing:,} predictions are the same (agreement); "
        "micro-average."
    )
    return SetReport(Accuracy(int(was.sum()), n), Accuracy(int(now.sum()), n), fixed, broken, agreeing, kept, protocol)
