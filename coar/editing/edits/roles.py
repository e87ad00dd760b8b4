"""What else a changed tensor is: another layer's weight, or the inner layer of one that an adapter stands beside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ablate.models.sharing import overlapping
from coar.errors import EditError

_WRAPPED = "base_layer"  # what peft calls the layer inside of an adapted one
_ADAPTERS = ("lora", "adapter")


def notes_on(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Returns for parameters that are more than they seem what to know when they change. Mutates nothing."""
    groups = overlapping(_every_name(model))
    found = {}
    for name in names:
        uses = [use for group in groups if name in group for use in group]
        notes = [f"one tensor, changes as {', '.join(uses)}"] if uses else []
        beside = list(_adapters_beside(model, name))
        notes += [f"stays beside it: {', '.join(beside)}"] if beside else []
        if notes:
            found[name] = "; ".join(notes)
    return found


def _every_name(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers, also those that have another name already."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def note_from_names(module: str, parameter: str) -> str:
    """Returns what an index alone tells of a component's tensor, empty if nothing; the model tells more."""
    if parameter.rpartition(".")[0] != module:
        return f"one tensor, changes as {parameter}, too"
    if module.rpartition(".")[2] == _WRAPPED:
        return f"stays beside it: what else is in {module.rpartition('.')[0]!r}"
    return ""


def _adapters_beside(model: nn.Module, parameter: str) -> Iterator[str]:
    """Yields the parameters of adapters that add to what a layer gives: in the layer, or around it and only for it."""
    layer = parameter.rpartition(".")[0]
    around, _, attribute = layer.rpartition(".")
    below = f"{layer}." if layer else ""
    yield from (name for name in _names(model, layer) if _is_adapter(name.removeprefix(below)))
    if layer:
        others = [name for name in _names(model, around) if not name.startswith(below)]
        if attribute == _WRAPPED or all(_is_adapter(name.removeprefix(f"{around}.")) for name in others):
            yield from others


def _names(model: nn.Module, module: str) -> list[str]:
    prefix = f"{module}." if module else ""
    return [prefix + name for name, _ in model.get_submodule(module).named_parameters()]


def _is_adapter(path: str) -> bool:
    return any(word in path.lower() for word in _ADAPTERS)


def require_one_value(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Raises EditError if two parameters that are one tensor in this model are to get different values."""
    tensors = _every_name(model)
    for group in overlapping(tensors):
        names = [name for name in group if name in changed]
        first = names[0] if names else ""
        for name in names[1:]:
            one, two = tensors[first], tensors[name]
            same = (one.storage_offset(), one.shape, one.stride()) == (two.storage_offset(), two.shape, two.stride())
            if not same or not torch.equal(changed[first], changed[name]):
                raise EditError(
                    f"{first!r} and {name!r} are one tensor in this {type(model).__name__}, and the edit gives them "
                    "different values. Select components of one of the two."
                )


def wrapping(model: nn.Module) -> str:
    """Returns advice, as a further sentence, if a model is a wrapper that renames parameters; else nothing."""
    if hasattr(model, "_orig_mod"):
        return " It is compiled: give the module it was made of, model._orig_mod."
    if [name for name, _ in model.named_children()] == ["module"]:
        return " It wraps another model: give that one, model.module."
    return ""
