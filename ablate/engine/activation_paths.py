"""Gradients with respect to activations along a path of inputs: conductance and influence of components.

An activation is what a component's gate multiplies: the module's output channels (`out` ports; the bias cancels where
differences count), or the slice of its input (`in` ports). Numbers of one component are summed over places and uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ablate.data.examples import Examples
from ablate.engine.checks import finite_gradients
from ablate.engine.engine import Engine
from ablate.engine.loops import Loops
from ablate.errors import DataError, GatingError
from ablate.gating.gates import Seen
from ablate.index.convolutions import per_channel


def conductance(
    engine: Engine, inputs: Any, targets: Any = None, *, points: Sequence[float], baseline: float = 0.0
) -> Tensor:
    """Returns the conductance of every component, (examples, components) on the CPU. Mutates nothing.

    The sum over consecutive points of the path of `gradient at the first . (activation at the second - at the first)`.

    Args:
      engine: The model, its components and output.
      inputs, targets: As for `engine.outputs`; inputs must be floating.
      points: At least two, from 0 (baseline) to 1 (the input), ascending.
      baseline: Every value of the input that the path starts from, as the model sees it (normalised).

    Cost: a forward and backward per example and point (no backward at the last). Memory: for one batch, the activations
      of all components, four times.

    Raises:
      DataError: Inputs are integers; there is no path between tokens.
      GatingError: A module cannot be gated per example; names it.
      NonFiniteOutputError: An output or a gradient is NaN or infinite.
    Source: Dhamdhere et al., "How important is a neuron?" (arXiv 1805.12233), Section 3; left sums as Captum's.
    """

    def fill(step: _Step, result: Tensor) -> None:
        following: list[_Activation] | None = None
        for point in reversed(points):
            seen = step.at(point, gradients=following is not None)
            if following is not None:
                _require_same(following, seen)
                for here, there in zip(seen, following, strict=True):
                    step.add(result, here, here.gradient * (there.values - here.values))
            following = [replace(activation, gradient=activation.values) for activation in seen]

    return _along(engine, inputs, targets, baseline, fill)


def influence(
    engine: Engine,
    inputs: Any,
    targets: Any = None,
    *,
    points: Sequence[float],
    shares: Sequence[float],
    baseline: float = 0.0,
) -> Tensor:
    """Returns the internal influence of every component, (examples, components) on the CPU. Mutates nothing.

    The mean gradient with respect to the component's activation, summed over places: per unit of activation, so not in
    units of the output. With a batch norm folded into a convolution: with respect to the convolution as it was.

    Args:
      engine, inputs, targets, baseline: As for `conductance`; errors as there.
      points: From 0 (baseline) to 1 (the input).
      shares: The weight of each point in the mean.

    Cost: a forward and backward per example and point.
    Source: Leino et al., "Influence-directed explanations" (arXiv 1802.03788), Section 3.
    """

    def fill(step: _Step, result: Tensor) -> None:
        for point, share in zip(points, shares, strict=True):
            for here in step.at(point, gradients=True):
                step.add(result, here, share * step.unfolded(here))

    return _along(engine, inputs, targets, baseline, fill)


def _along(engine: Engine, inputs: Any, targets: Any, baseline: float, fill: Callable[[_Step, Tensor], None]) -> Tensor:
    examples = Examples.of(inputs, targets)
    with engine.session(examples) as (loops, chunks):
        result = torch.zeros((len(examples), len(engine.index)), dtype=loops.dtype, device=engine.device)
        for first, placed in chunks:
            size = 1 if loops.gated_model.activation.alone else loops.gradient_batch_size
            for start, batch, labels in placed.batches(size):
                if not batch.is_floating_point():
                    raise DataError(
                        f"Inputs are {batch.dtype}, expected floating numbers: between integers (tokens) there is no "
                        "path from a baseline. Use a method without a path of inputs, e.g. 'gradient' or "
                        "'integrated_gate_gradients'."
                    )
                rows = result[first + start : first + start + len(labels)]
                fill(_Step(loops, batch, labels, first + start, baseline), rows)
    return finite_gradients(result.cpu(), examples)


@dataclass
class _Activation:
    """What passed one side of a weight in one use, and the gradient of the outputs with respect to it."""

    weight: str
    inside: bool
    seen: Seen
    values: Tensor
    gradient: Tensor


def _require_same(one: Sequence[_Activation], two: Sequence[_Activation]) -> None:
    """Raises GatingError unless the weights were used alike at two points of the path."""
    uses = [[(a.weight, a.inside, a.values.shape) for a in some] for some in (one, two)]
    if uses[0] != uses[1]:
        name = next((a[0] for a, b in zip(*uses, strict=False) if a != b), (uses[0] or uses[1])[-1][0])
        raise GatingError(
            f"The weight {name!r} is used in another way between the baseline and the input: what this model runs "
            "depends on its input. Conductance needs the same activations along the path; use another method."
        )


@dataclass
class _Step:
    """One batch, to be run at points between the baseline and itself."""

    loops: Loops
    inputs: Tensor
    targets: Tensor
    first: int
    baseline: float

    def at(self, point: float, gradients: bool) -> list[_Activation]:
        """Returns every activation at a point of the path, with its gradient if asked, else with itself."""
        gated_model = self.loops.gated_model
        inputs = torch.lerp(torch.full_like(self.inputs, self.baseline), self.inputs, point)
        gates = torch.ones((len(inputs), len(gated_model.index)), dtype=gated_model.dtype, device=inputs.device)
        if gradients:
            gated_model.activation.require_gradients()
        with gated_model.active(), gated_model.activation.tapped(), torch.set_grad_enabled(gradients):
            logits = gated_model.tapped(inputs, gates.requires_grad_(gradients))
            outputs = self.loops.measure(logits, self.targets, self.first)
            found = [
                (name, inside, seen)
                for name, site in gated_model.activation.sites.items()
                if site.gates.tap is not None
                for inside, side in ((True, site.gates.tap.inputs), (False, site.gates.tap.outputs))
                for seen in side
            ]
            values = [seen.values for _, _, seen in found]
            slopes = values
            if gradients and outputs.requires_grad:
                slopes = list(torch.autograd.grad(outputs.sum(), values, materialize_grads=True))
            elif gradients:
                slopes = [torch.zeros_like(value) for value in values]
        return [
            _Activation(name, inside, seen, value.detach(), slope.detach())
            for (name, inside, seen), value, slope in zip(found, values, slopes, strict=True)
        ]

    def unfolded(self, here: _Activation) -> Tensor:
        """Returns the gradient with respect to the output before the batch norm that was folded into its layer."""
        gated_model = self.loops.gated_model
        port = gated_model.activation.sites[here.weight].ports[0][1]
        if here.inside or port.module not in gated_model.folded_into:
            return here.gradient
        shape = [1] * here.gradient.ndim
        shape[here.seen.channels] = -1
        return here.gradient * gated_model.norm_scales[port.module].to(here.gradient.dtype).view(shape)

    def add(self, result: Tensor, here: _Activation, effect: Tensor) -> None:
        """Adds an effect, in the shape of an activation, to the components (examples, components) it belongs to."""
        by_channel = self._by_channel(effect, here.seen)
        first_row = here.seen.rows.start or 0
        site = self.loops.gated_model.activation.sites[here.weight]
        for first, port in site.ports:
            if here.inside != (port.port == "in" and not port.with_bias):
                continue
            units = per_channel(torch.arange(port.count, device=result.device), port.width, site.channels(port))
            units = units[first_row : first_row + by_channel.shape[1]]
            result.index_add_(1, first + units, by_channel[:, : len(units)].to(result.dtype))

    def _by_channel(self, effect: Tensor, seen: Seen) -> Tensor:
        """Returns an effect summed over places, (examples, channels)."""
        axis, channels, count = seen.layout.axis, seen.channels % effect.ndim, len(self.targets)
        if count == 1:
            return effect.movedim(channels, 0).reshape(1, effect.shape[channels], -1).sum(dim=2)
        each = effect.shape[axis] // count
        parts = (count, each) if seen.layout.blocked else (each, count)
        whole = effect.reshape(*effect.shape[:axis], *parts, *effect.shape[axis + 1 :])
        examples = axis if seen.layout.blocked else axis + 1
        whole = whole.movedim((examples, channels + (channels > axis)), (0, 1))
        return whole.reshape(count, whole.shape[1], -1).sum(dim=2)
