"""From a model to the ports of an index: every module in order, the kinds asked for in order, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ablate.errors import ModelMismatchError, SelectionError, UnknownNameError
from ablate.index.kinds import KINDS, Anatomy, Slices
from ablate.index.table import Port
from ablate.models.sharing import first_names

BY_NAME = "excluded by name"


class Listing:
    """The ports of a model, module by module, and what is left out."""

    def __init__(self, anatomy: Anatomy, kinds: Sequence[str], excluded: Mapping[str, str]) -> None:
        self.ports: list[Port] = []
        self.left_out: list[tuple[str, int, int, str]] = []
        model = anatomy.modules[""]
        others = first_names(model)
        self._names = {id(parameter): others.get(name, name) for name, parameter in model.named_parameters()}
        self._taken: dict[tuple[str, int, str], Port] = {}
        layer = 0
        for name, module in anatomy.modules.items():
            found = [(kind, slices) for kind in kinds for slices in KINDS[kind](name, module, anatomy)]
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if not found:
                if own:
                    own_type = type(module).__name__
                    article = "an" if own_type.startswith(tuple("AEIOU")) else "a"
                    reason = f"{article} {own_type} is none of {', '.join(kinds)}"
                    self.left_out.append((name, own, 0, reason))
            elif name in excluded:
                places = {(s.attribute, s.axis, s.port): _count(module, s) for _, s in reversed(found)}
                self.left_out.append((name, own, sum(places.values()), excluded[name]))
            else:
                before = len(self.ports)
                for kind, slices in found:
                    self._add(kind, layer, name, module, slices)
                layer += len(self.ports) > before

    def _add(self, kind: str, layer: int, name: str, module: nn.Module, slices: Slices) -> None:
        tensor = getattr(module, slices.attribute)
        parameter = self._names.get(id(tensor))
        if parameter is None:
            raise ModelMismatchError(
                f"Module {name!r}: its {slices.attribute} is computed (a parametrization?) and no parameter of the "
                "model, so it cannot be gated. Remove the parametrization, or leave the module out with exclude=[...]."
            )
        count = _count(module, slices)
        place = (parameter, slices.axis, slices.port)
        listed = self._taken.get(place)
        if listed is not None:
            same = f"shares its {slices.attribute} with {listed.module!r}"
            reason = same if listed.module != name else f"as {kind} the same slices as {listed.kind}"
            self.left_out.append((name, 0, count, f"{reason}, which is listed"))
            return
        width = tensor.shape[slices.axis] // count
        port = Port(kind, layer, name, parameter, slices.port, slices.axis, count, width, tensor.numel() // count)
        self._taken[place] = port
        self.ports.append(port)


def _count(module: nn.Module, slices: Slices) -> int:
    return slices.groups or int(getattr(module, slices.attribute).shape[slices.axis])


def neuron_kinds(anatomy: Anatomy) -> tuple[str, ...]:
    """Returns the kinds of all rows of linear maps: those that an attention keeps as bare weights need their own."""
    bare = any(weight.attribute != "weight" for weights in anatomy.qkv.values() for weight in weights)
    return ("linear_neuron", "qkv_neuron") if bare else ("linear_neuron",)


def excluded_by_name(anatomy: Anatomy, include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """Returns the modules that patterns leave out, each with the reason.

    Raises:
      SelectionError: A pattern where a list of them is expected.
      UnknownNameError: A pattern that fits no module.
    """
    for argument, value in (("include", include), ("exclude", exclude)):
        if isinstance(value, str):
            raise SelectionError(f"{argument} is the string {value!r}, expected a list: {argument}=[{value!r}].")
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in anatomy.modules):
            raise UnknownNameError(
                "module",
                pattern,
                (name for name in anatomy.modules if name),
                f"{sum(map(bool, anatomy.modules))} names were tried; patterns like 'layer4.*' are allowed.",
            )
    return {
        name: BY_NAME
        for name in anatomy.modules
        if not any(fnmatchcase(name, p) for p in include) or any(fnmatchcase(name, p) for p in exclude)
    }
