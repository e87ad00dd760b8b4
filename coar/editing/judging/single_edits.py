"""Many edits judged one at a time, their predictions kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ablate import Examples, model_hash, preserved_random_state
from ablate.logits import OutputKey
from ablate.models.copies import device_of
from ablate.work.progress import progress_bar
from coar.editing.abstract import Editor
from coar.editing.edits.half import dtype_of
from coar.editing.given import ExamplesLike, as_examples, named_sets
from coar.editing.judging.benchmark_sets import reject_duplicates
from coar.editing.judging.edit_predictions import LOCALITY, EditPredictions, KeptPredictions, compact
from coar.editing.judging.evaluate import Applicable, Predicting, applied_to, unedited_predictions
from coar.editing.predicting import Integers, require_eval
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.errors import EditError

EditFunction = Callable[[nn.Module, Tensor, Tensor], Applicable]
OnEdit = Callable[[str, str, Any], None]


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
    predict = Predicting(batch_size, output_key)
    predict.check(model, next(iter(groups.values())))
    base = unedited_predictions(model, groups, predict, None), unedited_predictions(model, sets, predict, None)
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
    predict: Predicting,
    any_weights: bool,
) -> None:
    """Appends to each list what the edited model predicts for the examples beside it."""
    with applied_to(edit, model, any_weights) as edited:
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
    require_eval(model)


def _kept(examples: Examples, base: Integers, rows: list[Integers]) -> KeptPredictions:
    return KeptPredictions(examples.ids, examples.targets.numpy(), base, np.stack(rows))
