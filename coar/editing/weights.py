"""From a selection to the weights that it covers, and from two edits to the weights that both change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ablate import Selection
from ablate.gating import touched_slices

if TYPE_CHECKING:
    from coar.editing.edit import Edit


def covered(selection: Selection, model: nn.Module) -> dict[str, Tensor]:
    """Returns per touched parameter a bool tensor of its shape and device, True where the selection covers a weight.

    Mutates nothing. Biases are covered by kinds that include them (`residual_branch`) only.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name, axis, units in touched_slices(selection, parameters):
        parameter = parameters[name]
        if name not in found:
            found[name] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        found[name].index_fill_(axis, torch.tensor(units, device=parameter.device), True)
    return found


def conflicts(first: Edit, second: Edit) -> list[str]:
    """Returns the names of the parameters in which two edits of one index change a common weight.

    A residual branch takes its bias along, so an edit of that bias conflicts with one of the branch.
    """
    whole = (set(first.operation.whole), set(second.operation.whole))
    touched = [{name for name, _, _ in _slices(edit.selection)} for edit in (first, second)]
    both = {*_overlap(first.selection, second.selection), *(whole[0] & whole[1])}
    return sorted(both | (whole[0] & touched[1]) | (whole[1] & touched[0]))


def changed_parameters(edit: Edit) -> set[str]:
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
