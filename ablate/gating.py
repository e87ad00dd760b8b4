"""The only module that changes a user's live model: literal ablation of a selection, with exact restore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ablate.selection import Selection


@contextmanager
def ablated(model: nn.Module, selection: Selection) -> Iterator[nn.Module]:
    """Gives the model with the selected components' weights zero, for the time of a `with` block.

    Changes the model in place and restores it bit for bit on exit, also when the block raises. Biases, normalisation,
    mode, gradients and hooks are left alone. Nested uses restore in reverse order.

    Args:
      model: The model the selection's index was made for.
      selection: What to switch off; each component's slice of its weight becomes zero.

    Raises:
      ModelMismatchError: The selection's index does not describe this model.
    Source: zero-ablation as in COAR (arXiv 2404.11534), Section 2.
    """
    with attenuated(model, selection, 0.0):
        yield model


@contextmanager
def attenuated(model: nn.Module, selection: Selection, factor: float) -> Iterator[None]:
    """Multiplies the selected components' weights by `factor` for the time of a `with` block; exact restore.

    Factor 1 touches nothing; factor 0 writes zeros, also over weights that are not finite.
    """
    saved = attenuate(model, selection, factor)
    try:
        yield
    finally:
        _put_back(dict(model.named_parameters()), saved)


def attenuate(model: nn.Module, selection: Selection, factor: float) -> list[tuple[str, int, Tensor, Tensor]]:
    """Multiplies the selected components' weights by `factor`, in place and for good; if it raises, not at all.

    Returns what it overwrote, as (parameter, axis, positions, original slices).
    """
    selection.index.check(model)
    saved: list[tuple[str, int, Tensor, Tensor]] = []
    if factor == 1.0:
        return saved
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, axis, units in _positions(selection, parameters):
                parameter = parameters[name]
                positions = torch.tensor(units, device=parameter.device)
                original = parameter.index_select(axis, positions)
                changed = torch.zeros_like(original) if factor == 0.0 else original * factor
                parameter.index_copy_(axis, positions, changed)
                saved.append((name, axis, positions, original))
    except BaseException:
        _put_back(parameters, saved)
        raise
    return saved


def _put_back(parameters: dict[str, nn.Parameter], saved: list[tuple[str, int, Tensor, Tensor]]) -> None:
    """Undoes `attenuate`, last change first: two parameters may be views of the same memory."""
    with torch.no_grad():
        for name, axis, positions, original in reversed(saved):
            parameters[name].index_copy_(axis, positions, original)


def _positions(selection: Selection, parameters: Mapping[str, Tensor]) -> list[tuple[str, int, list[int]]]:
    """Returns per touched parameter the positions along its axis that the selection covers."""
    found = []
    first = 0
    members = iter([*selection.ids, len(selection.index)])
    member = next(members)
    for port in selection.index.ports:
        units: list[int] = []
        while member < first + port.count:
            start = (member - first) * port.width
            units += range(start, start + port.width)
            member = next(members)
        if units:
            found.append((port.parameter, port.axis, units))
            bias = f"{port.module}.bias" if port.module else "bias"
            if port.with_bias and bias in parameters:
                found.append((bias, 0, units))
        first += port.count
    return found
