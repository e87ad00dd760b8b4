"""Mean activations of components: what mean ablation leaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ablate.errors import GatingError
from ablate.gating.attention import no_fast_path
from ablate.gating.uses import Op, UseMode, WeightRows, bias_of
from ablate.index.components import ComponentIndex


@dataclass
class Means:
    """Mean activations per gated weight, (channels,) float64: of its input and of its output, bias included."""

    inside: dict[str, Tensor] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)


class _Sums(UseMode):
    """Adds up the inputs and outputs of watched weights over everything but channels."""

    def __init__(self, model: nn.Module, index: ComponentIndex) -> None:
        parameters = dict(model.named_parameters())
        super().__init__({port.parameter: parameters[port.parameter] for port in index.ports})
        self.ports = {"in": set[str](), "out": set[str]()}
        for port in index.ports:
            self.ports[port.port].add(port.parameter)
        self.owners = {port.parameter: port.module for port in index.ports}
        self.biases = {port.parameter: bias_of(model, port) for port in index.ports}
        self.sizes = {name: parameters[name].shape for name in (*self.ports["in"], *self.ports["out"])}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[tuple[str, str], Tensor] = {}

    def before(self, name: str, op: Op, rows: WeightRows, x: Tensor) -> Tensor:
        """Adds an input."""
        if name in self.ports["in"]:
            self._add("in", name, self.sizes[name][1 - op.out_axis], op, 0, x)
        return x

    def after(self, name: str, op: Op, rows: WeightRows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Adds an output."""
        self._require_own_bias(name, rows, bias)
        if name in self.ports["out"]:
            total = self.sizes[name][op.out_axis] if op.groups is None else rows.stop
            self._add("out", name, total, op, rows.start, y)
        return y

    def _require_own_bias(self, name: str, rows: WeightRows, bias: Tensor | None) -> None:
        """Raises unless a use adds the bias of the weight's module: that is where weight gating puts the mean."""
        own = self.biases[name]
        if own is None or bias is None or own[rows.start :].data_ptr() != bias.data_ptr():
            module = self.owners[name]
            how = "without" if bias is None else "with another bias than"
            raise GatingError(
                f"The weight {name!r} is used {how} the bias of module {module!r}, which is to hold the "
                f"mean. Ablate to zero, or leave it out with exclude=[{module!r}]."
            )

    def _add(self, side: str, name: str, total: int, op: Op, start: int, values: Tensor) -> None:
        channels = op.channels % values.ndim
        flat = values.movedim(channels, -1).reshape(-1, values.shape[channels]).double()
        seen = slice(start, start + flat.shape[1])
        for totals, added in ((self.sums, flat.sum(dim=0)), (self.counts, len(flat))):
            zeros = torch.zeros(total, dtype=torch.float64, device=values.device)
            totals.setdefault((side, name), zeros)[seen] += added


def mean_activations(model: nn.Module, index: ComponentIndex, batches: Iterable[Tensor]) -> Means:
    """Returns the mean input or output of every gated weight, streamed, in float64: over batches, places and uses.

    Raises:
      GatingError: A weight is used without the bias that is to hold its mean; names the module.
    """
    sums = _Sums(model, index)
    with torch.no_grad(), no_fast_path(), sums:
        for batch in batches:
            model(batch)
    means = Means()
    for (side, name), total in sums.sums.items():
        count = sums.counts[side, name]  # 0 where an attention packs a projection that it does not use
        (means.inside if side == "in" else means.outside)[name] = total / count.clamp(min=1)
    return means
