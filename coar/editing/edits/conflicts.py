"""From two edits to the weights that both change."""

from __future__ import annotations

from ablate import Selection
from ablate.gating.literal import touched_slices
from coar.editing.edits.value import EditValue


def conflicts(first: EditValue, second: EditValue) -> list[str]:
    """Returns the names of the parameters in which two edits of one index change a common weight.

    A residual branch takes its bias along, so an edit of that bias conflicts with one of the branch.
    """
    whole = (set(first.operation.whole), set(second.operation.whole))
    touched = [{name for name, _, _ in _slices(edit.selection)} for edit in (first, second)]
    both = {*_overlap(first.selection, second.selection), *(whole[0] & whole[1])}
    return sorted(both | (whole[0] & touched[1]) | (whole[1] & touched[0]))


def changed_parameters(edit: EditValue) -> set[str]:
    """Returns the names of the parameters that an edit may change; a bias that the model lacks may be among them."""
    return {name for name, _, _ in _slices(edit.selection)} | set(edit.operation.whole)


def _overlap(first: Selection, second: Selection) -> list[str]:
    """Returns the names of parameters in which two selections of one index cover a common weight."""
    places: dict[str, list[tuple[int, set[int]]]] = {}
    for name, axis, units in _slices(first):
        places.setdefault(name, []).append((axis, set(units)))
    common = []
    for name, axis, units in _slices(second):
        if any(axis != other or not taken.isdisjoint(units) for other, taken in places.get(name, [])):
            common.append(name)
    return list(dict.fromkeys(common))


def _slices(selection: Selection) -> list[tuple[str, int, list[int]]]:
    """Returns the slices that a selection touches, with the bias that a residual branch takes along if it has one."""
    biases = {f"{port.module}.bias" if port.module else "bias" for port in selection.index.ports}
    return touched_slices(selection, biases)
