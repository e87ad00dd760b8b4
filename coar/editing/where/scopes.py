"""Which parameters a method trains: those of a selection, of one layer, or of one side of a layer in the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ablate import ComponentIndex, Selection
from ablate.index.flow import all_uses as all_uses
from ablate.index.flow import order_of_use as order_of_use
from ablate.index.structure import linear_axes
from ablate.models.sharing import overlapping
from coar.editing.edits.covered import covered
from coar.editing.edits.operations import Delta
from coar.errors import EditError


@dataclass(frozen=True, eq=False)
class Scope:
    """What trains.

    Attributes:
      selection: The components among it.
      trained: Parameter name -> the weights that may move, bool of its shape; None: all of it.
      whole: Those of them that are no components: biases, normalisation, embeddings, what the index leaves out.
    """

    selection: Selection
    trained: Mapping[str, Tensor | None]
    whole: tuple[str, ...] = ()

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns a copy of the trained parameters as they are now."""
        return {name: model.get_parameter(name).detach().clone() for name in self.trained}

    def put(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Sets the trained parameters of a model to what `values` returned, bit for bit."""
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)

    def operation(self, model: nn.Module, before: Mapping[str, Tensor]) -> Delta:
        """Returns the operation that leads from the values `before` to those that the model has now."""
        where = {name: torch.ones_like(before[name], dtype=torch.bool) for name in self.trained}
        where |= {name: mask for name, mask in self.trained.items() if mask is not None}
        where = {name: mask for name, mask in where.items() if name not in self.whole}
        after = {name: model.get_parameter(name).detach() for name in self.trained}
        return Delta.between(before, after, where, self.whole)

    def weights(self, model: nn.Module) -> int:
        """Returns how many numbers train."""
        sizes = (model.get_parameter(n).numel() if m is None else int(m.sum()) for n, m in self.trained.items())
        return sum(sizes)


def selected(selection: Selection, model: nn.Module) -> Scope:
    """Returns the weights of the selected components, and nothing else."""
    return Scope(selection, dict(covered(selection, model)))


def whole_layer(selection: Selection, model: nn.Module, method: str) -> Scope:
    """Returns the weight of the one layer that a selection lies in; no bias.

    Raises:
      EditError: It lies in several weights.
    """
    names = list(covered(selection, model))
    if len(names) != 1:
        raise EditError(
            f"{method} with scope 'local' trains the weight of one layer, the selection lies in {len(names)}: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Select with index.where(module=...), or pass "
            "scope='selection'."
        )
    return _all_of(names, selection.index, model)


def from_layer_on(selection: Selection, model: nn.Module, inputs: Tensor) -> Scope:
    """Returns every parameter that a forward pass uses from the first selected layer on, up to the logits.

    Biases, normalisation and shortcuts that run after it are among them.
    """
    uses = all_uses(model, inputs)
    first = min(_position(uses, name) for name in covered(selection, model))
    behind = set(uses[first:])
    return _all_of([name for name in dict.fromkeys(uses) if name in behind], selection.index, model)


def weights_up_to_layer(selection: Selection, model: nn.Module, inputs: Tensor) -> Scope:
    """Returns the weights of all layers that a forward pass uses up to the last selected one; no bias, no norm."""
    order = order_of_use(model, inputs)
    last = max(_position(order, name) for name in covered(selection, model))
    names = [n for n in order[: last + 1] if "weight" in n.rpartition(".")[2] and model.get_parameter(n).ndim > 1]
    return _all_of(names, selection.index, model)


def all_but_head(selection: Selection, model: nn.Module, inputs: Tensor) -> tuple[Scope, str | None]:
    """Returns every parameter that a forward pass uses but those of the layer that gives the logits, and its name.

    The head is the module of the weight that is used last, if it has an output per class; else there is none. A weight
    that is the head's under another name (a tied embedding) is the head, and so is what only acts on the logits: a
    bias, a scale.
    """
    uses = all_uses(model, inputs)
    with torch.no_grad():
        classes = model(inputs[:1]).shape[1]
    weights = [name for name in uses if model.get_parameter(name).ndim > 1]
    tied = _names_of(model, weights[-1]) if weights else []
    layer = next((n for n in reversed(tied) if linear_axes(model.get_submodule(_owner(n)))), tied[-1] if tied else "")
    axes = linear_axes(model.get_submodule(_owner(layer))) or (0, 1)
    rows = model.get_parameter(layer).shape[axes[0]] if weights else 0
    if rows != classes and (rows, classes) != (1, 2):  # one logit is that of two classes
        return _all_of(dict.fromkeys(uses), selection.index, model), None
    body = [i for i, name in enumerate(uses) if name in weights and name not in tied]
    end = len(uses) - 1 - uses[::-1].index(weights[-1])
    scales = {name for name in uses[max(body, default=-1) + 1 :] if model.get_parameter(name).numel() == 1}
    inside = set(uses[:end]) - scales - set(tied)
    rest = [name for name in dict.fromkeys(uses) if name in inside and _owner(name) != _owner(layer)]
    return _all_of(rest, selection.index, model), _owner(layer)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _names_of(model: nn.Module, parameter: str) -> list[str]:
    """Returns every name of a parameter, and of those that lie in its memory."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return next((group for group in overlapping(named) if parameter in group), [parameter])


def _position(order: list[str], name: str) -> int:
    if name not in order:
        raise EditError(f"A forward pass of the model does not use {name!r}: training cannot change its predictions.")
    return order.index(name)


def _all_of(names: Collection[str], index: ComponentIndex, model: nn.Module) -> Scope:
    """Returns all of these parameters, as components where the index lists the whole of one."""
    listed = covered(index.select(range(len(index))), model)
    complete = {name for name in names if name in listed and bool(listed[name].all())}
    chosen = [i for port, first, stop in index.spans() if port.parameter in complete for i in range(first, stop)]
    selection = index.select(chosen)
    touched = covered(selection, model)
    whole = tuple(name for name in names if not (name in touched and bool(touched[name].all())))
    return Scope(selection, dict.fromkeys(names), whole)
