"""Weight gating: one keep-vector per forward, by changing the weights of a model that the engine owns, in place.

The forward is then the plain forward: nothing is added to it, and at float32 without folding its numbers are, bit for
bit, those of a copy of the model whose weights were zeroed by hand.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ablate.errors import GatingError
from ablate.gating.means import Means
from ablate.gating.uses import bias_of
from ablate.index.components import ComponentIndex
from ablate.index.convolutions import per_channel
from ablate.index.table import Port


@dataclass
class _Weight:
    parameter: str
    ports: list[tuple[int, Port]]  # with the id of the port's first component
    weight: Tensor  # the live parameter
    master: Tensor  # its original value
    bias: Tensor | None
    bias_master: Tensor | None
    in_mean: Tensor | None
    out_mean: Tensor | None
    closed: Tensor | None = None  # positions closed by the last keep-vector, where only rows are touched
    whole: bool = True  # the weight is the original but for the positions in `closed`

    @property
    def by_rows(self) -> bool:
        """Whether closing components means zeroing some rows and no more."""
        return len(self.ports) == 1 and self.in_mean is None and self.out_mean is None and not self.changes_bias

    @property
    def changes_bias(self) -> bool:
        """Whether the bias depends on the gates."""
        means = self.in_mean is not None or self.out_mean is not None
        return self.bias is not None and (means or any(port.with_bias for _, port in self.ports))

    def set_rows(self, closed: Tensor) -> None:
        """Gives the rows closed before their values back and zeroes these; `closed` int64, in units of the port."""
        _, port = self.ports[0]
        if port.width > 1:
            closed = (closed[:, None] * port.width + torch.arange(port.width, device=closed.device)).flatten()
        if not self.whole:
            self.restore()
        if self.closed is not None and len(self.closed):
            self.weight.index_copy_(port.axis, self.closed, self.master.index_select(port.axis, self.closed))
        self.weight.index_fill_(port.axis, closed, 0)
        self.closed = closed

    def set_product(self, gates: Tensor) -> None:
        """Writes the product of a finite weight and gates of its dtype, (components,): one kernel, no waiting."""
        self.closed, self.whole = None, False
        first, port = self.ports[0]
        gate = gates[first : first + port.count]
        shape = [1] * self.master.ndim
        shape[port.axis] = -1
        if port.width > 1:
            gate = gate.repeat_interleave(port.width)
        torch.mul(self.master, gate.view(shape), out=self.weight)

    def set_gates(self, gates: Tensor) -> None:
        """Multiplies by gates, (components,), of any real value; exactly zero at 0, also over inf and nan."""
        self.closed, self.whole = None, False
        inside = outside = branch = None
        value = self.master
        for first, port in self.ports:
            own = gates[first : first + port.count].to(value.dtype)
            gate = own.repeat_interleave(port.width) if port.width > 1 else own
            shape = [1] * value.ndim
            shape[port.axis] = -1
            shaped = gate.view(shape)
            value = torch.mul(value, shaped, out=self.weight).masked_fill_(shaped == 0, 0)
            if port.port == "in":
                inside = gate if inside is None else inside * gate
                continue
            if self.bias is not None and self.changes_bias:
                gate = per_channel(own, port.width, len(self.bias))
            if port.with_bias:
                branch = gate if branch is None else branch * gate
            else:
                outside = gate if outside is None else outside * gate
        if self.changes_bias:
            self._set_bias(inside, outside, branch)

    def _set_bias(self, inside: Tensor | None, outside: Tensor | None, branch: Tensor | None) -> None:
        if self.bias is None or self.bias_master is None:
            return
        plain = bias = self.bias_master
        if inside is not None and self.in_mean is not None:
            axis = next(port.axis for _, port in self.ports if port.port == "in")
            bias = bias + torch.tensordot(self.master, (1 - inside) * self.in_mean, dims=([axis], [0]))
        if outside is not None:
            bias = torch.lerp(plain if self.out_mean is None else self.out_mean, bias, outside)
        if branch is not None:
            bias = bias * branch if self.out_mean is None else torch.lerp(self.out_mean, bias, branch)
        self.bias.copy_(bias)

    def restore(self) -> None:
        self.closed, self.whole = None, True
        self.weight.copy_(self.master)
        if self.changes_bias and self.bias is not None and self.bias_master is not None:
            self.bias.copy_(self.bias_master)


def _is_finite(weight: Tensor) -> bool:
    """Returns whether no number is NaN or infinite: their sum tells in one pass, unless it overflows by itself."""
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


class WeightGates:
    """The weights of one model under one keep-vector at a time, and their way back.

    Args:
      model: Owned by the caller; its weights change in place and `restore` gives them back, bit for bit.
      index: Its components.
      means: For mean ablation: what closed gates leave; None: what zeroed weights leave.

    Memory: one more copy of the gated weights.
    """

    def __init__(self, model: nn.Module, index: ComponentIndex, means: Means | None = None) -> None:
        index.check(model)
        parameters = dict(model.named_parameters())
        found: dict[str, _Weight] = {}
        self._firsts: list[int] = []  # the first component of each port
        self._owners: list[int] = []  # and the position of its weight
        for port, first, _ in index.spans():
            if port.parameter not in found:
                weight = parameters[port.parameter].detach()
                bias = bias_of(model, port)
                in_mean = None if means is None else means.inside.get(port.parameter)
                out_mean = None if means is None else means.outside.get(port.parameter)
                if bias is None and means is not None:
                    raise GatingError(
                        f"Module {port.module!r} has no bias to hold the mean. Ablate to zero, or leave it out with "
                        f"exclude=[{port.module!r}]."
                    )
                found[port.parameter] = _Weight(
                    port.parameter,
                    [],
                    weight,
                    weight.clone(),
                    bias,
                    None if bias is None else bias.clone(),
                    None if in_mean is None else in_mean.to(weight.dtype),
                    None if out_mean is None else out_mean.to(weight.dtype),
                )
            found[port.parameter].ports.append((first, port))
            self._firsts.append(first)
            self._owners.append(list(found).index(port.parameter))
        self._weights = list(found.values())
        self._by_rows = all(site.by_rows for site in self._weights)
        self._on_cpu = all(site.weight.device.type == "cpu" for site in self._weights)
        # a product makes nan of inf times zero: those rare weights take the careful way
        self._by_product = self._by_rows and all(_is_finite(site.master) for site in self._weights)

    def set_keep(self, keep: Tensor) -> None:
        """Makes the model run with this keep-vector, (components,) bool: kept as it is, or closed.

        Cost: on the CPU, the rows that change; elsewhere one product per gated weight, without waiting for it.
        """
        if not self._on_cpu and self._by_product:
            gates = keep.to(self._weights[0].master.dtype)
            for site in self._weights:
                site.set_product(gates)
            return
        if not self._by_rows or not self._on_cpu:
            self.set_gates(keep)
            return
        closed = torch.nonzero(~keep).flatten()
        edges = torch.tensor([site.ports[0][0] for site in self._weights] + [len(keep)])
        cuts = torch.searchsorted(closed, edges).tolist()
        for site, start, stop in zip(self._weights, cuts[:-1], cuts[1:], strict=True):
            site.set_rows(closed[start:stop] - site.ports[0][0])

    def set_gates(self, gates: Tensor) -> None:
        """Makes the model run with these gates, (components,) real or bool on the model's device."""
        for site in self._weights:
            site.set_gates(gates)

    def weight_of(self, component: int) -> int:
        """Returns the position, among the gated weights, of the weight that a component is a slice of."""
        return self._owners[bisect_right(self._firsts, component) - 1]

    def changed_with(self, position: int) -> tuple[Tensor, ...]:
        """Returns what changes with a gated weight: itself, and its bias where that depends on gates."""
        site = self._weights[position]
        return (site.weight, site.bias) if site.changes_bias and site.bias is not None else (site.weight,)

    def close_one(self, component: int, row: Tensor) -> None:
        """Makes the model run with a row of which only one component is closed; all weights are as they were made.

        The same bits as `set_keep` for a row (components,) of bool, as `set_gates` for real gates. Touches one weight;
        `restore_one` gives it back.
        """
        site = self._weights[self.weight_of(component)]
        if row.dtype != torch.bool or not self._by_rows:
            site.set_gates(row)
        elif self._on_cpu:
            site.set_rows(torch.tensor([component - site.ports[0][0]]))
        elif self._by_product:
            site.set_product(row.to(site.master.dtype))
        else:
            site.set_gates(row)

    def restore_one(self, component: int) -> None:
        """Gives the weight of a component its original value."""
        self._weights[self.weight_of(component)].restore()

    def restore(self) -> None:
        """Gives every gated weight its original value, bit for bit."""
        for site in self._weights:
            site.restore()

    @property
    def masters(self) -> int:
        """Bytes held for the original values."""
        return sum(site.master.numel() * site.master.element_size() for site in self._weights)
