"""The default components of a model: filters or neurons that it uses, and never the rows that make the classes."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from ablate.index.convolutions import CONVOLUTIONS
from ablate.index.flow import Flow
from ablate.index.kinds import Anatomy
from ablate.index.listing import neuron_kinds
from ablate.index.structure import linear_axes

UNUSED = "a forward pass does not use it"
GUESSED = "the model could not be followed: give example_inputs to find out by running it"


class Default(NamedTuple):
    """The kinds that a model's default components have, and the modules that are left out (name -> why)."""

    kinds: tuple[str, ...]
    excluded: dict[str, str]


def default_components(anatomy: Anatomy, flow: Flow | None) -> Default:
    """Returns `conv_filter` where convolutions outnumber hidden linear layers, else the kinds of all neurons.

    Left out are the layers that make the classes and those that a forward pass does not use.

    Args:
      anatomy: The model.
      flow: What is known of its forward; None: every linear layer that may make the classes is left out.
    """
    unused = _unused(anatomy, flow)
    linear = [name for name, module in anatomy.modules.items() if linear_axes(module) and name not in unused]
    convolutions = [
        name for name, module in anatomy.modules.items() if isinstance(module, CONVOLUTIONS) and name not in unused
    ]
    heads = _heads(anatomy, flow, linear)
    hidden = len(linear) - max(1, sum(name in heads for name in linear))
    filters = sum(name not in heads for name in convolutions)
    kinds = ("conv_filter",) if filters > hidden else neuron_kinds(anatomy)
    return Default(kinds, unused | heads)


def _unused(anatomy: Anatomy, flow: Flow | None) -> dict[str, str]:
    """Returns the modules with weights that a forward pass passes by, e.g. heads that serve training only."""
    if flow is None:
        return {}
    own = {name for name, m in anatomy.modules.items() if next(m.parameters(recurse=False), None) is not None}
    return dict.fromkeys(own - _with_shared_weights(anatomy, flow.order), UNUSED)


def _with_shared_weights(anatomy: Anatomy, used: Collection[str]) -> set[str]:
    """Returns these modules, and others that hold one of their weights: a use tells one name of a weight only."""
    weights = {id(p) for name in used if name in anatomy.modules for p in _own(anatomy, name)}
    return {*used, *(name for name in anatomy.modules if any(id(p) in weights for p in _own(anatomy, name)))}


def _own(anatomy: Anatomy, name: str) -> list[Tensor]:
    return list(anatomy.modules[name].parameters(recurse=False))


def _heads(anatomy: Anatomy, flow: Flow | None, linear: list[str]) -> dict[str, str]:
    """Returns the layers whose rows make the classes, with how that is known."""
    if flow is None:
        return _possible_heads(anatomy, linear)
    if flow.makers:
        return dict.fromkeys(flow.makers, f"makes what the model returns, the classes: {flow.how}")
    last = sorted(linear, key=flow.position)[-1:]
    return dict.fromkeys(last, f"the linear layer that is used last, and may make the classes: {flow.how}")


def _possible_heads(anatomy: Anatomy, linear: list[str]) -> dict[str, str]:
    """Returns every linear layer that may make the classes, judged by the order of declaration and by widths.

    The last one declared, and others of its width that no layer reads; where a layer does read its outputs, and so the
    order of declaration is not that of use, all that no layer reads.
    """
    widths = {name: _widths(anatomy, name) for name in linear}
    read = {inputs for inputs, _ in widths.values()}
    structure = {*anatomy.qkv, *anatomy.heads, *anatomy.ffn_first, *anatomy.ffn_second}
    ends = [name for name, (_, outputs) in widths.items() if outputs not in read and name not in structure]
    last = linear[-1:]
    found = dict.fromkeys(last, f"the linear layer declared last, taken for the one that makes the classes; {GUESSED}")
    if last and last[0] in ends:
        ends = [name for name in ends if widths[name][1] == widths[last[0]][1]]
    others = (name for name in ends if name not in found)
    return found | dict.fromkeys(others, f"no layer reads its outputs, so it may make the classes; {GUESSED}")


def _widths(anatomy: Anatomy, name: str) -> tuple[int, int]:
    """Returns the numbers of (inputs, outputs) of a linear layer."""
    outputs, inputs = linear_axes(anatomy.modules[name]) or (0, 1)
    weight = anatomy.modules[name].get_parameter("weight")
    return int(weight.shape[inputs]), int(weight.shape[outputs])
