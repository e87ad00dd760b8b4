"""Activation gating: a gate per example and component, differentiable, on a model that the engine owns.

A layer whose own forward is the only use of its weight becomes a gated layer of the same class. Every other use
(functional, packed into attention) is gated where it happens, by the identity of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ablate.errors import GatingError, NoGradientError
from ablate.gating.attention import no_fast_path
from ablate.gating.gated_layers import ROLES, GatedAttention, gated_class
from ablate.gating.gates import Gates, Places, Tap
from ablate.gating.means import Means
from ablate.gating.probe import ProbeReport, Use
from ablate.gating.uses import Op, UseMode, WeightRows
from ablate.index.components import ComponentIndex
from ablate.index.convolutions import per_channel
from ablate.index.table import Port


@dataclass
class _Site:
    """One gated weight: its ports with the id of their first component, how it is used, and its gates."""

    parameter: str
    ports: list[tuple[int, Port]]
    uses: list[Use]
    gates: Gates = field(default_factory=Gates)
    places: list[Places] = field(default_factory=list)  # of each use; `gates` has those of all

    @property
    def by_layer(self) -> bool:
        """Whether the layer itself can be gated: every use is its own forward, always with the same layout."""
        owner = self.ports[0][1].module
        return self.one_layout and all(use.by_forward and use.module == owner for use in self.uses)

    @property
    def one_layout(self) -> bool:
        """Whether all uses agree on where the examples are."""
        return len({(use.in_layout, use.out_layout) for use in self.uses}) == 1

    def channels(self, port: Port) -> int:
        """Returns how many channels one of the ports gates: those of the weight, of a transposed convolution of all."""
        if port.port == "out" and self.uses and self.uses[0].op.groups is not None:
            return self.uses[0].rows.stop
        return port.count * port.width

    @property
    def how(self) -> list[tuple[Any, ...]]:
        """How the weight is used, but for where the examples are."""
        return [(use.module, use.op, use.rows, use.by_forward) for use in self.uses]

    def place(self, uses: list[Use]) -> None:
        """Takes over the uses that were found on inputs of some shape."""
        self.uses = uses
        self.places = [places_of([use]) for use in uses]
        self.gates.places = places_of(uses)

    def leaf(self, owner: str) -> str:
        """Returns the parameter's name within a module."""
        return self.parameter.removeprefix(f"{owner}.") if owner else self.parameter

    def attention(self, model: nn.Module) -> str | None:
        """Returns the `nn.MultiheadAttention` whose forward makes all uses of this weight, None if there is none."""
        owners = {use.module for use in self.uses}
        if len(owners) != 1 or not self.one_layout:
            return None
        owner = owners.pop()
        module = model.get_submodule(owner)
        known = type(module) in (nn.MultiheadAttention, GatedAttention)
        return owner if known and self.leaf(owner) in ROLES else None


class ActivationGates:
    """Gates every example's components of a model that the engine owns; the model is plain while none are set.

    Args:
      model: Owned by the engine: its layers become gated ones, in place.
      index: Its components.
      report: What `probe` found out about this model with this index.

    Attributes:
      problems: Every module that cannot be gated, with the reason; `active` refuses if there is one.
      alone: Every module in which the places of examples are not known, with the reason: if there is one, gates are
        right in forwards of one example only.
      no_gradient: Every module whose gates have no true gradient, with the reason.
    """

    def __init__(self, model: nn.Module, index: ComponentIndex, report: ProbeReport) -> None:
        self._model = model
        self.index = index
        self.problems: dict[str, str] = {}
        self.alone: dict[str, str] = {}
        self.no_gradient: dict[str, str] = {}
        self.sites: dict[str, _Site] = {}
        self.layers: list[str] = []
        self.attentions: list[str] = []
        self._counts = [port.count for port in index.ports]
        self._known = set(report.strange)
        for port, first, _ in index.spans():
            problem = _problem(port, report)
            if problem is not None:
                self.problems.setdefault(port.module, problem)
            if port.parameter not in self.sites:
                site = self.sites[port.parameter] = _Site(port.parameter, [], [], Gates(port.module))
                site.place(report.uses.get(port.parameter, []))
            self.sites[port.parameter].ports.append((first, port))
        self._find_alone()
        parameters = dict(model.named_parameters())
        self._watched: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            if not site.uses or any(port.module in self.problems for _, port in site.ports):
                continue
            attention = site.attention(model)
            if site.by_layer:
                self._gate_layer(site)
            elif attention is not None:
                self._gate_attention(site, attention)
            else:
                self._watched[name] = parameters[name]
        self.functional = _FunctionalGates(self._watched, self.sites) if self._watched else None

    def _find_alone(self) -> None:
        for site in self.sites.values():
            for _, port in site.ports:
                reason = _unknown_places(port, site.uses)
                if reason is not None and port.module not in self.problems:
                    self.alone.setdefault(port.module, reason)

    def _gate_layer(self, site: _Site) -> None:
        module: Any = self._model.get_submodule(site.ports[0][1].module)
        module.__class__ = gated_class(type(module))  # type: ignore[arg-type]  # a class of modules is hashable
        module.gates, module.channels = site.gates, site.uses[0].op.channels
        self.layers.append(site.ports[0][1].module)

    def gate_where_used(self, name: str) -> bool:
        """Gates the uses of a weight, and no more the layer that owns it; returns whether that was another way."""
        site = self.sites[name]
        owner = site.ports[0][1].module
        if owner not in self.layers:
            return False
        module: Any = self._model.get_submodule(owner)
        module.__class__ = type(module).__mro__[2]  # the gated class is made of GatedLayer and the layer's own
        del module.gates, module.channels
        self.layers.remove(owner)
        self._watched[name] = self._model.get_parameter(name)
        self.functional = _FunctionalGates(self._watched, self.sites)
        return True

    def _gate_attention(self, site: _Site, name: str) -> None:
        module: Any = self._model.get_submodule(name)
        if type(module) is nn.MultiheadAttention:
            module.__class__ = GatedAttention
            vars(module)["parts"] = {}
        module.parts[ROLES[site.leaf(name)]] = site.gates
        self.attentions.extend(port.module for _, port in site.ports)

    def look(self, report: ProbeReport, shape: tuple[int, ...]) -> None:
        """Takes over where the examples are on inputs of this shape.

        Raises:
          GatingError: Weights are used in another way than on the inputs that the engine was made with; names the
            module.
        """
        for name, site in self.sites.items():
            module = site.ports[0][1].module
            if module in self.problems:
                continue
            before, by_layer, uses = site.how, module in self.layers, report.uses.get(name, [])
            found = _Site(name, site.ports, uses)
            strange = name in report.strange and name not in self._known
            if strange or before != found.how or (by_layer and not found.one_layout):
                raise GatingError(
                    f"Module {module!r} is used in another way on inputs of shape {shape} than on those that the "
                    f"engine was made with. Make an engine for them, leave it out with exclude=[{module!r}], or use "
                    "outputs() in mode 'weight'."
                )
            site.place(uses)
        self._find_alone()

    def split(self, gates: Tensor) -> tuple[Tensor, ...]:
        """Returns gates (examples, components) by port: what `set` takes, and what gradients are taken to."""
        return gates.split_with_sizes(self._counts, dim=1)

    def set(self, parts: Sequence[Tensor] | None) -> None:
        """Sets the gates of the coming forward, as `split` gives them, in the model's dtype; None: plain."""
        for site in self.sites.values():
            site.gates.inside = site.gates.outside = site.gates.branch = None
        if self.functional is not None:
            self.functional.restart()
        if parts is None:
            return
        for port, part in zip(self.index.ports, parts, strict=True):
            site = self.sites[port.parameter]
            mine, gates = per_channel(part, port.width, site.channels(port)), site.gates
            if port.with_bias:
                gates.branch = _times(gates.branch, mine)
            elif port.port == "in":
                gates.inside = _times(gates.inside, mine)
            else:
                gates.outside = _times(gates.outside, mine)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Takes the gradients off the gates that are set, for a forward without autograd within a `with` block."""
        before = [
            (site.gates, site.gates.inside, site.gates.outside, site.gates.branch) for site in self.sites.values()
        ]
        if self.functional is not None:
            self.functional.restart()
        try:
            for gates, *values in before:
                gates.inside, gates.outside, gates.branch = (None if v is None else v.detach() for v in values)
            yield
        finally:
            for gates, inside, outside, branch in before:
                gates.inside, gates.outside, gates.branch = inside, outside, branch

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Notes what passes every gated weight for the time of a `with` block, at `sites[...].gates.tap`."""
        try:
            for site in self.sites.values():
                site.gates.tap = Tap()
            yield
        finally:
            for site in self.sites.values():
                site.gates.tap = None

    def use_means(self, means: Means, dtype: torch.dtype) -> None:
        """Makes closed gates leave the mean activation."""
        for site in self.sites.values():
            inside, outside = means.inside.get(site.parameter), means.outside.get(site.parameter)
            site.gates.in_mean = None if inside is None else inside.to(dtype)
            site.gates.out_mean = None if outside is None else outside.to(dtype)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Gates functional uses, too, for the time of a `with` block; leaves the model plain."""
        if self.problems:
            module, problem = next(iter(self.problems.items()))
            raise GatingError(
                f"Module {module!r} cannot be gated per example: {problem}. Leave it out with exclude=[{module!r}], "
                "or use outputs() in mode 'weight'."
            )
        try:
            with no_fast_path(), self.functional or nullcontext():
                yield
        finally:
            self.set(None)

    def require_gradients(self) -> None:
        """Raises NoGradientError where gates have no true gradient; names the modules."""
        if self.no_gradient:
            raise NoGradientError(self.no_gradient, next(iter(self.no_gradient.values())))


def _times(one: Tensor | None, two: Tensor) -> Tensor:
    return two if one is None else one * two


class _FunctionalGates(UseMode):
    """Gates the uses of weights that no layer's own forward makes, each where it happens."""

    def __init__(self, watched: Mapping[str, Tensor], sites: Mapping[str, _Site]) -> None:
        super().__init__(watched)
        self._sites = sites
        self._done: dict[str, int] = {}

    def before(self, name: str, op: Op, rows: WeightRows, x: Tensor) -> Tensor:
        """Returns the gated input."""
        return self._sites[name].gates.close_input(x, op.channels, self._places(name, op))

    def after(self, name: str, op: Op, rows: WeightRows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the gated output."""
        places = self._places(name, op)
        self._done[name] = self._done.get(name, 0) + 1
        return self._sites[name].gates.close_output(y, bias, op.channels, slice(rows.start, rows.stop), places)

    def restart(self) -> None:
        """Counts the uses from the first one again: a forward begins."""
        self._done = {}

    def _places(self, name: str, op: Op) -> Places:
        """Returns where the examples are in the use that is due: a forward makes those that the probe saw, in order."""
        site = self._sites[name]
        due = self._done.get(name, 0) % len(site.uses)
        if site.uses[due].op is not op:
            raise GatingError(
                f"The weight of module {site.gates.module!r} is used by {op.name} where the engine saw "
                f"{site.uses[due].op.name} on two examples: this batch is run in another way. Leave it out with "
                f"exclude=[{site.gates.module!r}], or use outputs() in mode 'weight'."
            )
        return site.places[due]


def places_of(uses: Sequence[Use]) -> Places:
    """Returns the different places of examples at the input and output of some uses."""
    inside = {(x.axis, x.blocked, x.each, x.ndim): x for use in uses if (x := use.in_layout) is not None}
    outside = {(y.axis, y.blocked, y.each, y.ndim): y for use in uses if (y := use.out_layout) is not None}
    return Places(tuple(inside.values()), tuple(outside.values()))


def _problem(port: Port, report: ProbeReport) -> str | None:
    """Returns why a port cannot be gated per example, None if it can."""
    if port.parameter in report.strange:
        return f"its weight {port.parameter!r} is used by {report.strange[port.parameter]}"
    uses = report.uses.get(port.parameter)
    if not uses:
        return "it was never used when the model ran on two examples"
    for use in uses:
        filters = port.axis == use.op.out_axis or (use.op.groups is not None and port.count == use.rows.stop)
        if filters != (port.port == "out"):
            return f"axis {port.axis} of its weight is no {port.port} port of {use.op.name}"
        if port.port == "in" and use.op.name.startswith("conv"):
            return f"in ports of {use.op.name} are not gated"
    return None


def _unknown_places(port: Port, uses: Sequence[Use]) -> str | None:
    """Returns why the places of a batch's examples at a port are not known, None if they are."""
    for use in uses:
        if (use.in_layout if port.port == "in" else use.out_layout) is None:
            return f"its examples were not found in the {port.port}put of {use.op.name} in {use.module!r}"
        if use.moved is not None:
            return use.moved
    return None
