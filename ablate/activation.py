"""Activation gating: a gate per example and component, differentiable, on a model that the engine owns.

A layer whose own forward is the only use of its weight becomes a gated layer of the same class. Every other use
(functional, packed into attention) is gated where it happens, by the identity of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ablate.ablation import Means
from ablate.attention import attention_forward
from ablate.components import ComponentIndex, Port
from ablate.convolutions import per_channel
from ablate.errors import GatingError
from ablate.gates import EVERY_ROW, Gates, Tap
from ablate.probe import Layout, ProbeReport, Use, no_fast_path
from ablate.uses import Op, Rows, UseMode, linear_rows


class GatedLayer(nn.Module):
    """Mixed into a copy of a layer's class: the layer's forward between its gates; plain while no gates are set."""

    gates: Gates
    in_layout: Layout | None
    out_layout: Layout | None
    channels: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output with its gates applied."""
        x = self.gates.close_input(x, self.in_layout, self.channels)
        y: Tensor = super().forward(x, *args, **kwargs)
        bias = cast("Tensor | None", self.bias)
        return self.gates.close_output(y, bias, self.out_layout, self.channels, EVERY_ROW)


@cache
def _gated_class(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gated{layer.__name__}", (GatedLayer, layer), {"__module__": layer.__module__})


class GatedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` taken apart, with gates at its projections; plain while no gates are set.

    Its own forward calls one fused function with all the weights, which no layer inside can see.
    """

    parts: dict[str, tuple[Gates, Layout | None, Layout | None]]  # by role: in, q, k, v, out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the attention's output and, if asked, its weights; the signature is torch's."""
        if not any(gates.closed_somewhere for gates, _, _ in self.parts.values()):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        flip = self.batch_first and query.ndim == 3
        if flip:
            same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        packed = self._qkv_same_embed_dim
        out, shares = attention_forward(
            self._project,
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not packed,
            q_proj_weight=None if packed else self.q_proj_weight,
            k_proj_weight=None if packed else self.k_proj_weight,
            v_proj_weight=None if packed else self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if flip else out), shares

    def _project(
        self, role: str, x: Tensor, weight: Tensor, bias: Tensor | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        rows = Rows(start, len(weight) if stop is None else stop)
        if role not in self.parts:
            return linear_rows(x, weight, bias, rows)[0]
        gates, in_layout, out_layout = self.parts[role]
        x = gates.close_input(x, in_layout, -1)
        y, offset = linear_rows(x, weight, bias, rows)
        return gates.close_output(y, offset, out_layout, -1, slice(rows.start, rows.stop))


ROLES = {
    "in_proj_weight": "in",
    "q_proj_weight": "q",
    "k_proj_weight": "k",
    "v_proj_weight": "v",
    "out_proj.weight": "out",
}


@dataclass
class _Site:
    """One gated weight: its ports with the id of their first component, how it is used, and its gates."""

    parameter: str
    ports: list[tuple[int, Port]]
    uses: list[Use]
    gates: Gates = field(default_factory=Gates)

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

    `problems` names every module that cannot be gated, with the reason; `active` refuses if there is one.
    """

    def __init__(self, model: nn.Module, index: ComponentIndex, report: ProbeReport) -> None:
        self._model = model
        self.index = index
        self.problems: dict[str, str] = {}
        self.sites: dict[str, _Site] = {}
        self.layers: list[str] = []
        self.attentions: list[str] = []
        first = 0
        for port in index.ports:
            problem = _problem(port, report)
            if problem is not None:
                self.problems.setdefault(port.module, problem)
            site = self.sites.setdefault(port.parameter, _Site(port.parameter, [], report.uses.get(port.parameter, [])))
            site.ports.append((first, port))
            first += port.count
        functional: dict[str, Tensor] = {}
        parameters = dict(model.named_parameters())
        for name, site in self.sites.items():
            if not site.uses or any(port.module in self.problems for _, port in site.ports):
                continue
            attention = site.attention(model)
            if site.by_layer:
                self._gate_layer(site)
            elif attention is not None:
                self._gate_attention(site, attention)
            else:
                functional[name] = parameters[name]
        self.functional = _FunctionalGates(functional, self.sites) if functional else None

    def _gate_layer(self, site: _Site) -> None:
        module: Any = self._model.get_submodule(site.ports[0][1].module)
        use = site.uses[0]
        module.__class__ = _gated_class(type(module))  # type: ignore[arg-type]  # a class of modules is hashable
        module.gates, module.channels = site.gates, use.op.channels
        module.in_layout, module.out_layout = use.in_layout, use.out_layout
        self.layers.append(site.ports[0][1].module)

    def _gate_attention(self, site: _Site, name: str) -> None:
        module: Any = self._model.get_submodule(name)
        if type(module) is nn.MultiheadAttention:
            module.__class__ = GatedAttention
            vars(module)["parts"] = {}
        use = site.uses[0]
        role = ROLES[site.leaf(name)]
        module.parts[role] = (site.gates, use.in_layout, use.out_layout)
        self.attentions.extend(port.module for _, port in site.ports)

    def set(self, gates: Tensor | None) -> None:
        """Sets the gates of the coming forward, (examples, components) in the model's dtype; None: plain."""
        for site in self.sites.values():
            site.gates.inside = site.gates.outside = site.gates.branch = None
            if gates is None:
                continue
            for first, port in site.ports:
                mine = per_channel(gates[:, first : first + port.count], port.width, site.channels(port))
                if port.with_bias:
                    site.gates.branch = _times(site.gates.branch, mine)
                elif port.port == "in":
                    site.gates.inside = _times(site.gates.inside, mine)
                else:
                    site.gates.outside = _times(site.gates.outside, mine)

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
            with no_fast_path():
                if self.functional is None:
                    yield
                else:
                    with self.functional:
                        yield
        finally:
            self.set(None)


def _times(one: Tensor | None, two: Tensor) -> Tensor:
    return two if one is None else one * two


class _FunctionalGates(UseMode):
    """Gates the uses of weights that no layer's own forward makes, each where it happens."""

    def __init__(self, watched: Mapping[str, Tensor], sites: Mapping[str, _Site]) -> None:
        super().__init__(watched)
        self._sites = sites
        self._done: dict[str, int] = {}

    def __enter__(self) -> _FunctionalGates:
        self._done = {}
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def before(self, name: str, op: Op, rows: Rows, x: Tensor) -> Tensor:
        """Returns the gated input."""
        return self._sites[name].gates.close_input(x, self._use(name).in_layout, op.channels)

    def after(self, name: str, op: Op, rows: Rows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the gated output."""
        layout = self._use(name).out_layout
        self._done[name] = self._done.get(name, 0) + 1
        return self._sites[name].gates.close_output(y, bias, layout, op.channels, slice(rows.start, rows.stop))

    def _use(self, name: str) -> Use:
        uses = self._sites[name].uses
        return uses[self._done.get(name, 0) % len(uses)]


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
        if (use.in_layout if port.port == "in" else use.out_layout) is None:
            return f"its examples were not found in the {port.port}put of {use.op.name} in {use.module!r}"
    return None
