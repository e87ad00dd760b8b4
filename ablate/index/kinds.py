"""The kinds of components: for each a rule from one module to the slices of its weights that are components."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

from torch import nn

from ablate.index.convolutions import CONVOLUTIONS, TRANSPOSED, filters_of
from ablate.index.residual import ResidualBlocks
from ablate.index.structure import Structure, Weight, linear_axes, mixing_axes


class Anatomy(Structure):
    """What the rules know of a model: attentions, feed-forward networks and residual blocks, each found when asked."""

    @cached_property
    def residual(self) -> ResidualBlocks:
        """The residual blocks."""
        return ResidualBlocks(self)


class Slices(NamedTuple):
    """Components of one kind in one weight of a module: all slices of `axis`, or `groups` equal runs of them."""

    attribute: str
    port: str
    axis: int
    groups: int | None = None  # None: one component per slice


Rule = Callable[[str, nn.Module, Anatomy], list[Slices]]


def _conv_filter(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    filters = filters_of(module)
    return [Slices("weight", "out", filters.axis, filters.runs)] if filters else []


def _linear_neuron(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    axes = linear_axes(module)
    return [Slices("weight", "out", axes[0])] if axes else []


def _linear_input(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    axes = linear_axes(module)
    return [Slices("weight", "in", axes[1])] if axes else []


def _attention_head(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    axes = mixing_axes(module)
    return [Slices("weight", "in", axes[1], model.heads[name])] if axes and name in model.heads else []


def _qkv_neuron(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    return _rows(model.qkv.get(name, ()))


def _ffn_in(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    return _rows(model.ffn_first.get(name, ()))


def _ffn_hidden(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    return [Slices(w.attribute, "in", 1 - w.out_axis) for w in model.ffn_second.get(name, ())]


def _residual_branch(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    if name not in model.residual.branches:
        return []
    axes = mixing_axes(module)
    return [Slices("weight", "out", axes[0] if axes else 0, 1)]


def _layer(name: str, module: nn.Module, model: Anatomy) -> list[Slices]:
    if isinstance(module, CONVOLUTIONS):
        return [Slices("weight", "out", 1 if isinstance(module, TRANSPOSED) else 0, 1)]
    axes = linear_axes(module)
    if axes:
        return [Slices("weight", "out", axes[0], 1)]
    # projections that an attention keeps as bare weights are linear layers too
    return [rows._replace(groups=1) for rows in _rows(model.qkv.get(name, ()))]


def _rows(weights: Iterable[Weight]) -> list[Slices]:
    return [Slices(weight.attribute, "out", weight.out_axis) for weight in weights]


# A kind is a rule by type and structure, never by name. The order is that of `component_kinds()`.
KINDS: dict[str, Rule] = {
    "conv_filter": _conv_filter,
    "linear_neuron": _linear_neuron,
    "linear_input": _linear_input,
    "attention_head": _attention_head,
    "qkv_neuron": _qkv_neuron,
    "ffn_in": _ffn_in,
    "ffn_hidden": _ffn_hidden,
    "ffn_out": _ffn_hidden,  # the same slices under the name that papers on editing give them
    "residual_branch": _residual_branch,
    "layer": _layer,
}
STRUCTURAL = ("attention_head", "qkv_neuron", "ffn_in", "ffn_hidden", "ffn_out", "residual_branch")


def component_kinds() -> tuple[str, ...]:
    """Returns the names of the component kinds."""
    return tuple(KINDS)
