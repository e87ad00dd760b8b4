"""Judging edits: predictions before and after, on named sets of examples, kept so that any metric can be computed.

Metrics of the predictions are in `coar.metrics`; nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ablate import Examples, model_hash, preserved_random_state
from ablate.buffers import restored_buffers
from ablate.copying import device_of
from ablate.logits import OutputKey, class_logits, logits_of
from ablate.progress import progress_bar
from ablate.state import neutral_ambient
from ablate.steady import require_steady
from coar.editing.abstract import Editor
from coar.editing.benchmark_sets import reject_duplicates
from coar.editing.edit import Edit
from coar.editing.edit_predictions import LOCALITY, EditPredictions, KeptPredictions, compact
from coar.editing.given import ExamplesLike, as_examples, named_sets
from coar.editing.half import dtype_of
from coar.editing.request import TOKENS, Request
from coar.editing.running import BATCH as BATCH
from coar.editing.running import memory_reported, run
from coar.errors import EditError
from coar.metrics.accuracy import Accuracy
from coar.metrics.corrected import Outcomes, outcomes

Integers = npt.NDArray[np.integer[Any]]


class Applicable(Protocol):
    """What can be judged: an `Edit`, or anything else that edits a model for the time of a `with` block."""

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Gives the edited model; restores the given one at the end."""


EditFunction = Callable[[nn.Module, Tensor, Tensor], Applicable]
OnEdit = Callable[[str, str, Any], None]


def predictions(
    model: nn.Module,
    examples: ExamplesLike,
    *,
    batch_size: int = BATCH,
    output_key: OutputKey = None,
    check: bool = True,
) -> npt.NDArray[np.int64]:
    """Returns the predicted class of each example, (examples,); of classes with equal logits the first.

    The model and the global random state are unchanged. What stands around the call (autocast, TF32) changes nothing.

    Args:
      model: In eval mode, all of it; returns logits (examples, classes).
      examples: With one label each: Examples, (inputs, targets) or a data set.
      batch_size: Examples per forward pass. Another one may change logits by rounding.
      output_key: Where in what the model returns the logits are, as for `ablate.Engine`.
      check: Whether to check, on two of the examples, that the model is deterministic and each example's logits are its
        own, as the engine does. False: it was checked before.

    Raises:
      EditError: Training mode, inputs the model fails on, another shape of outputs, NaN or +inf among the logits, or
        labels beyond the classes.
      GatingError: The model is random in eval mode, or mixes the examples of a batch.
      OutOfMemoryError: Memory did not suffice; says what to lower.
    """
    examples = as_examples(examples, "examples")
    _require_eval(model)
    if examples.per_token:
        raise EditError(f"These examples have a target per token, and predictions are one class per example. {TOKENS}")
    if not examples.labelled:
        raise EditError("These examples have no labels; predictions are compared with them. Give one class each.")
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}, expected at least 1.")
    device = device_of(model)
    dtype = dtype_of(model)
    found = np.empty(len(examples), dtype=np.int64)
    with (
        preserved_random_state(),
        restored_buffers(model),
        neutral_ambient(device),
        torch.no_grad(),
        memory_reported(batch_size),
    ):
        for start, inputs, targets in examples.chunks(batch_size):
            prepared = examples.prepared(inputs.to(device), dtype)
            logits = logits_of(run(model, prepared), output_key)
            found[start : start + len(targets)] = _classes(logits, examples, start, targets)
            if check and not start:
                require_steady(model, prepared[:2], output_key)
    return found


def _require_eval(model: nn.Module) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"Module {training!r} of this {type(model).__name__}" if training else f"This {type(model).__name__}"
        raise EditError(
            f"{where} is in training mode: dropout and batch norm would make predictions depend on chance. Call "
            "model.eval() first."
        )


def _classes(logits: Tensor, examples: Examples, start: int, targets: Tensor) -> npt.NDArray[np.int64]:
    if logits.ndim not in (1, 2) or len(logits) != len(targets):
        raise EditError(
            f"The model returns shape {tuple(logits.shape)} for {len(targets)} examples, expected logits of shape "
            "(examples, classes)."
        )
    values = class_logits(logits.detach()).double().cpu().numpy()
    bad = (np.isnan(values) | (values == np.inf)).any(axis=1)
    if bad.any():
        raise EditError(
            f"The model's logits for example {examples.ids[start + int(bad.argmax())]!r} hold NaN or infinity, so "
            "there is no prediction. An edit with too large steps does that; so do such inputs or weights."
        )
    if int(targets.max()) >= values.shape[1]:
        raise EditError(
            f"Example {examples.ids[start + int(targets.argmax())]!r} has label {int(targets.max())}, the model has "
            f"classes 0 to {values.shape[1] - 1}."
        )
    classes: npt.NDArray[np.int64] = values.argmax(axis=1)
    return classes


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
    predict = _Predicting(batch_size, output_key)
    if not set(sets) <= set(base or {}):  # what is known was predicted by a model that was checked
        predict.check(model, next(iter(sets.values())))
    before = _base(model, sets, predict, base)
    with _applied(edit, model, any_weights) as edited:
        after = {name: predict(edited, examples) for name, examples in sets.items()}
    return EditReport(repr(edit), {name: _report(sets[name], before[name], after[name]) for name in sets})


def _applied(edit: Applicable, model: nn.Module, any_weights: bool) -> AbstractContextManager[nn.Module]:
    """Applies an edit; only an `Edit` knows about the weights that it was made for."""
    return edit.applied(model, any_weights=any_weights) if isinstance(edit, Edit) else edit.applied(model)


@dataclass(frozen=True)
class _Predicting:
    """How models are run: `predictions` with these settings."""

    batch_size: int
    output_key: OutputKey

    def __call__(self, model: nn.Module, examples: Examples) -> Integers:
        return predictions(model, examples, batch_size=self.batch_size, output_key=self.output_key, check=False)

    def check(self, model: nn.Module, examples: Examples) -> None:
        """Checks a model once, on two examples, before it predicts many sets with and without edits."""
        two = examples.take(range(min(2, len(examples))))
        predictions(model, two, batch_size=self.batch_size, output_key=self.output_key)


def _base(
    model: nn.Module, sets: Mapping[str, Examples], predict: _Predicting, known: Mapping[str, Integers] | None
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


def evaluate_single_edits(
    model: nn.Module,
    editor: Editor | EditFunction,
    groups: Mapping[str, ExamplesLike],
    locality: ExamplesLike | None = None,
    *,
    more: Mapping[str, ExamplesLike] | None = None,
    method: str | None = None,
    details: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
    output_key: OutputKey = None,
    progress: bool = False,
    on_edit: OnEdit | None = None,
    any_weights: bool = False,
) -> EditPredictions:
    """Returns what every single-example edit predicts: one edit per example, each from the unedited model.

    For each example of each group: make the edit, predict the whole group, the locality set and all further sets with
    it, keep the predictions, forget the edit. The model and the global random state are unchanged.

    Args:
      model: The unedited model, in eval mode.
      editor: A method, which gets the example and its label; or a function (model, inputs (1, ...) as the model takes
        them, labels (1,), both on its device) that returns an edit and leaves the model as it is.
      groups: Examples to edit, by group: usually failures of one kind, see `failure_groups`.
      locality: Ordinary examples, whose predictions should stay; see `boundary_set`.
      more: Further sets to predict after every edit.
      method, details: Written into the result; by default the method's name and settings.
      batch_size: Examples per forward pass.
      output_key: Where in what the model returns the logits are, as for `ablate.Engine`.
      progress: Show progress on stderr.
      on_edit: Called with (group, id, edit) after each edit, e.g. to save it.
      any_weights: Take also edits that the function found on a model with other weights; see `Edit.apply`.

    Cost: per edit the edit itself, one pass over its group and all sets, and one hash of the model; the unedited model
    predicts everything once. Memory: 2 bytes per prediction; some 10 for a moment.

    Raises:
      EditError: No groups, one input in a group twice or in a group and among ordinary ones, an editor that changes the
        model, or what `predictions` and the method raise, with the example named in a note.
    """
    groups = named_sets(groups, "groups")
    sets = _all_sets(groups, locality, more)
    name = getattr(editor, "__name__", type(editor).__name__)
    if isinstance(editor, Editor):
        name, details = editor.title, editor.describe() if details is None else details
    base_hash = model_hash(model)
    predict = _Predicting(batch_size, output_key)
    predict.check(model, next(iter(groups.values())))
    base = _base(model, groups, predict, None), _base(model, sets, predict, None)
    found: dict[str, list[Integers]] = {group: [] for group in groups}
    beside: dict[str, list[Integers]] = {key: [] for key in sets}
    make = _as_function(editor, output_key)
    total = sum(len(examples) for examples in groups.values())
    with preserved_random_state(), progress_bar("editing", total, 0, "edit", progress) as bar:
        for group, examples in groups.items():
            judged = [(examples, found[group]), *((examples, beside[key]) for key, examples in sets.items())]
            for i, example in enumerate(examples.ids):
                try:
                    edit = make(model, *_one(model, examples, i))
                    _require_unchanged(model, base_hash)
                    _predict_edited(model, edit, judged, predict, any_weights)
                except Exception as error:
                    error.add_note(f"This was the edit for example {example!r} of group {group!r}.")
                    raise
                if on_edit is not None:
                    on_edit(group, example, edit)
                bar.update(1)
    _require_unchanged(model, base_hash)
    return EditPredictions(
        {key: _kept(examples, base[0][key], found[key]) for key, examples in groups.items()},
        {key: _kept(examples, base[1][key], beside[key]) for key, examples in sets.items()},
        name if method is None else method,
        base_hash,
        dict(details or {}),
    )


def _predict_edited(
    model: nn.Module,
    edit: Applicable,
    judged: list[tuple[Examples, list[Integers]]],
    predict: _Predicting,
    any_weights: bool,
) -> None:
    """Appends to each list what the edited model predicts for the examples beside it."""
    with _applied(edit, model, any_weights) as edited:
        for examples, rows in judged:
            rows.append(compact(predict(edited, examples)))


def _all_sets(
    groups: Mapping[str, Examples], locality: ExamplesLike | None, more: Mapping[str, ExamplesLike] | None
) -> dict[str, Examples]:
    """Returns the sets that every edit predicts, after checking that nothing in them is also edited."""
    if not groups:
        raise EditError("There are no groups: nothing to edit. Give at least one group of examples.")
    if more is not None and LOCALITY in more:
        raise EditError(f"A set in `more` is called {LOCALITY!r}. Give it as locality=, or another name.")
    sets = {} if locality is None else {LOCALITY: as_examples(locality, "locality")}
    reject_duplicates(groups, sets)
    return {**sets, **named_sets(more or {}, "more")}


def _as_function(editor: Editor | EditFunction, output_key: OutputKey) -> EditFunction:
    if not isinstance(editor, Editor):
        return editor
    method = editor

    def edit_one(model: nn.Module, inputs: Tensor, labels: Tensor) -> Applicable:
        return method.edit(model, Request(inputs, labels), output_key=output_key)

    return edit_one


def _one(model: nn.Module, examples: Examples, i: int) -> tuple[Tensor, Tensor]:
    """Returns one example as an editor takes it, (1, ...) and (1,), on the model's device."""
    device = device_of(model)
    inputs = examples.prepared(examples.inputs(i, i + 1).to(device), dtype_of(model))
    return inputs, examples.targets[i : i + 1].to(device)


def _require_unchanged(model: nn.Module, expected: str) -> None:
    if model_hash(model) != expected:
        raise EditError(
            "The editor, or applying its edit, changed the model: the next edit would not start from the unedited "
            "model. Let the editor work on a copy and return an Edit."
        )
    _require_eval(model)


def _kept(examples: Examples, base: Integers, rows: list[Integers]) -> KeptPredictions:
    return KeptPredictions(examples.ids, examples.targets.numpy(), base, np.stack(rows))
