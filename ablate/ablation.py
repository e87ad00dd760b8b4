"""What a closed gate leaves behind: nothing of the weights, the component's mean, or a share of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ablate.attention import no_fast_path
from ablate.components import ComponentIndex
from ablate.data import Examples
from ablate.errors import DataError, GatingError, UnknownNameError
from ablate.uses import Op, Rows, UseMode, bias_of


class Ablation(ABC):
    """What ablating a component does. `closed` is the gate of an ablated component."""

    name: str
    closed: float = 0.0

    @abstractmethod
    def describe(self) -> str:
        """Returns the ablation as a store records it."""


class ZeroAblation(Ablation):
    """The published COAR convention: the component's weights become zero; bias and normalisation stay.

    Source: COAR (arXiv 2404.11534), Section 2.
    """

    name = "zero"

    def describe(self) -> str:
        """Returns `zero`."""
        return self.name


class ScaleAblation(Ablation):
    """The component's weights are multiplied by a factor: 0.5 damps, 2 doubles, -1 turns round."""

    name = "scale"

    def __init__(self, factor: float) -> None:
        self.closed = float(factor)

    def describe(self) -> str:
        """Returns `scale` and the factor."""
        return f"scale {self.closed!r}"


class MeanAblation(Ablation):
    """The component's activation becomes its mean over a reference set, over examples and positions.

    Args:
      reference: Examples, a Dataset, or a tensor of inputs (examples, ...). Streamed once.
    """

    name = "mean"

    def __init__(self, reference: Any) -> None:
        if isinstance(reference, Tensor):
            reference = Examples(reference, torch.zeros(len(reference), dtype=torch.int64))
        self.reference = Examples.of(reference)

    def describe(self) -> str:
        """Returns `mean` and the hash of the reference set."""
        return f"mean over {self.reference.hash}"


def ablation_names() -> tuple[str, ...]:
    """Returns the names of the ablations a spec may ask for."""
    return (ZeroAblation.name, MeanAblation.name, ScaleAblation.name)


def get_ablation(ablation: str | Ablation) -> Ablation:
    """Returns the ablation of this name, or the instance given."""
    if isinstance(ablation, Ablation):
        return ablation
    if ablation == ZeroAblation.name:
        return ZeroAblation()
    known = {"mean": "ablate.MeanAblation(reference)", "scale": "ablate.ScaleAblation(factor)"}
    if ablation in known:
        raise DataError(f"ablation is {ablation!r}, which needs an argument: pass {known[ablation]}.")
    raise UnknownNameError("ablation", str(ablation), ablation_names())


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

    def before(self, name: str, op: Op, rows: Rows, x: Tensor) -> Tensor:
        """Adds an input."""
        if name in self.ports["in"]:
            self._add("in", name, self.sizes[name][1 - op.out_axis], op, 0, x)
        return x

    def after(self, name: str, op: Op, rows: Rows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Adds an output."""
        self._require_own_bias(name, rows, bias)
        if name in self.ports["out"]:
            total = self.sizes[name][op.out_axis] if op.groups is None else rows.stop
            self._add("out", name, total, op, rows.start, y)
        return y

    def _require_own_bias(self, name: str, rows: Rows, bias: Tensor | None) -> None:
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
