"""The only module that changes a user's live model: literal ablation and replaced weights, with exact restore."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ablate.index.components import Selection


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
    return attenuate_memory(dict(model.named_parameters()), selection, factor)


def attenuate_memory(
    parameters: Mapping[str, Tensor], selection: Selection, factor: float
) -> list[tuple[str, int, Tensor, Tensor]]:
    """Does what `attenuate` does to tensors that are given by name."""
    saved: list[tuple[str, int, Tensor, Tensor]] = []
    if factor == 1.0:
        return saved
    try:
        for name, axis, units in touched_slices(selection, parameters):
            parameter = parameters[name]
            with _writing(parameter):
                positions = torch.tensor(units, device=parameter.device)
                original = parameter.index_select(axis, positions)
                changed = torch.zeros_like(original) if factor == 0.0 else original * factor
                parameter.index_copy_(axis, positions, changed)
                saved.append((name, axis, positions, original))
    except BaseException:
        _put_back(parameters, saved)
        raise
    return saved


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Writes values into a model's parameters, by name, for the time of a `with` block; exact restore, also on error.

    In place: optimizers, tied weights and views of them see the values, too.
    """
    parameters = dict(model.named_parameters())
    saved: list[tuple[str, Tensor]] = []
    try:
        for name, value in weights.items():
            saved.append((name, parameters[name].detach().clone()))
            with _writing(parameters[name]):
                parameters[name].copy_(value)
        yield
    finally:
        for name, original in reversed(saved):
            with _writing(parameters[name]):
                parameters[name].copy_(original)


def _writing(parameter: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which a parameter may be changed in place: one made in inference mode only in that."""
    return torch.inference_mode() if parameter.is_inference() else torch.no_grad()


def _put_back(parameters: Mapping[str, Tensor], saved: list[tuple[str, int, Tensor, Tensor]]) -> None:
    """Undoes `attenuate`, last change first: two parameters may be views of the same memory."""
    for name, axis, positions, original in reversed(saved):
        with _writing(parameters[name]):
            parameters[name].index_copy_(axis, positions, original)


def touched_slices(selection: Selection, parameters: Container[str]) -> list[tuple[str, int, list[int]]]:
    """Returns, per port, the parameter that a selection touches, the axis, and the positions along it.

    A bias that belongs to a component (a residual branch's) is listed if it is one of the `parameters`.
    """
    found = []
    members = iter([*selection.ids, len(selection.index)])
    member = next(members)
    for port, first, stop in selection.index.spans():
        units: list[int] = []
        while member < stop:
            start = (member - first) * port.width
            units += range(start, start + port.width)
            member = next(members)
        if units:
            found.append((port.parameter, port.axis, units))
            bias = f"{port.module}.bias" if port.module else "bias"
            if port.with_bias and bias in parameters:
                found.append((bias, 0, units))
    return found
