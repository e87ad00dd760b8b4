"""The layers of a model that an edit may be put into: feed-forward networks, attentions, residual blocks, modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ablate import ComponentIndex, Selection
from ablate.errors import UnknownNameError
from ablate.index.kinds import Anatomy
from coar.editing.where.defaults import by_use
from coar.errors import EditError

# per kind of layer the kinds of components that cover it
COMPONENTS = {
    "ffn": ("ffn_in", "ffn_out"),
    "attention": ("qkv_neuron", "attention_head"),
    "residual": ("conv_filter", "linear_neuron"),
    "module": ("conv_filter", "linear_neuron"),
}
LAYER_KINDS = tuple(COMPONENTS)


@dataclass(frozen=True)
class Place:
    """One or several layers of one kind, in a row or not.

    Attributes:
      kind: `ffn`, `attention`, `residual` or `module`; of layers of several kinds: all, joined by " + ".
      layers: Names of the layers, in the order of their use.
      selection: Their weights.
    """

    kind: str
    layers: tuple[str, ...]
    selection: Selection

    @property
    def name(self) -> str:
        """What a table calls it: first and last layer, e.g. `ffn blocks.7.mlp to blocks.9.mlp`."""
        if len(self.layers) == 1:
            return f"{self.kind} {self.layers[0]}"
        return f"{self.kind} {self.layers[0]} to {self.layers[-1]}"

    def __add__(self, other: Place) -> Place:
        kinds = " + ".join(dict.fromkeys((*self.kind.split(" + "), *other.kind.split(" + "))))
        return Place(kinds, (*self.layers, *other.layers), self.selection | other.selection)


def default_layer_kinds(model: nn.Module) -> tuple[str, ...]:
    """Returns `ffn` and `attention` for a transformer, `residual` for a residual network, else `module`."""
    anatomy = Anatomy(model)
    found = [kind for kind in ("ffn", "attention", "residual") if _members(anatomy, model, kind)]
    transformer = [kind for kind in found if kind != "residual"]
    return tuple(transformer or found or ["module"])


def layers_of(model: nn.Module, kinds: Sequence[str]) -> list[Place]:
    """Returns the layers of these kinds, kind by kind, in the order of their use; all selections are of one index.

    Mutates nothing.

    Args:
      model: The model.
      kinds: `ffn`: both layers of each feed-forward network. `attention`: query, key, value and output projection.
        `residual`: every convolution and linear layer of each residual block. `module`: each convolution or linear
        layer of the model's default index, without shortcuts.

    Raises:
      UnknownNameError: A kind that is none.
      EditError: No kinds, or the model has no layer of one.
    """
    if isinstance(kinds, str) or not len(kinds):
        raise EditError(f"kinds is {kinds!r}, expected a list of some of: {', '.join(LAYER_KINDS)}.")
    anatomy = Anatomy(model)
    members: dict[str, dict[str, list[str]]] = {}
    for kind in kinds:
        if kind not in COMPONENTS:
            raise UnknownNameError("kind of layer", kind, LAYER_KINDS)
        members[kind] = _members(anatomy, model, kind)
        if not members[kind]:
            raise EditError(f"This {type(model).__name__} has no layer of kind {kind!r}. Leave it out of kinds.")
    wanted = list(dict.fromkeys(component for kind in kinds for component in COMPONENTS[kind]))
    index = ComponentIndex.from_model(model, wanted)
    found = []
    for kind, layers in members.items():
        for name, modules in layers.items():
            place = Place(kind, (name,), index.select(_components(index, kind, set(modules))))
            if len(place.selection):
                found.append(place)
    return found


def windows(layers: Sequence[Place], window: int) -> list[Place]:
    """Returns every run of `window` consecutive layers of one kind, kind by kind.

    Raises:
      EditError: A kind has fewer layers than that.
    """
    if window < 1:
        raise EditError(f"window is {window}, expected at least 1 layer.")
    found = []
    for kind in dict.fromkeys(place.kind for place in layers):
        own = [place for place in layers if place.kind == kind]
        if len(own) < window:
            raise EditError(f"There are {len(own)} layers of kind {kind!r}, too few for a window of {window}.")
        for start in range(len(own) - window + 1):
            place = own[start]
            for other in own[start + 1 : start + window]:
                place = place + other
            found.append(place)
    return found


def _members(anatomy: Anatomy, model: nn.Module, kind: str) -> dict[str, list[str]]:
    """Returns layer name -> names of the modules that hold its weights, in the order in which they are used."""
    declared = _declared(anatomy, model, kind)
    layer_of = {module: layer for layer, modules in reversed(declared.items()) for module in modules}
    used = by_use(model, (module for modules in declared.values() for module in modules))
    return {layer: declared[layer] for layer in dict.fromkeys(layer_of[module] for module in used)}


def _declared(anatomy: Anatomy, model: nn.Module, kind: str) -> dict[str, list[str]]:
    """Returns layer name -> names of the modules that hold its weights, in the order of their declaration."""
    if kind == "ffn":
        return {
            name: [*(weight.module for weight in network.first), network.second.module]
            for name, network in anatomy.feed_forwards.items()
        }
    if kind == "attention":
        return {
            name: [*(weight.module for weight in attention.qkv), attention.out.module]
            for name, attention in anatomy.attentions.items()
        }
    if kind == "residual":
        order = {name: position for position, name in enumerate(anatomy.modules)}
        blocks = sorted(dict.fromkeys(anatomy.residual.branches.values()), key=lambda name: order.get(name, len(order)))
        return {block: [name for name in anatomy.modules if name.startswith(f"{block}.")] for block in blocks}
    shortcuts = anatomy.residual.shortcuts
    modules = dict.fromkeys(port.module for port in ComponentIndex.from_model(model).ports)
    return {name: [name] for name in modules if name not in shortcuts}


def _components(index: ComponentIndex, kind: str, modules: set[str]) -> list[int]:
    """Returns the ids of a layer's components: of residual blocks and modules the rows, whatever they are called."""
    found: list[int] = []
    for port, first, stop in index.spans():
        rows = kind in ("residual", "module") and port.port == "out"
        if port.module in modules and (rows or port.kind in COMPONENTS[kind]):
            found += range(first, stop)
    return found
