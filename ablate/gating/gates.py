"""The gates of one weight: what they do to activations, and a tap that notes what passes them.

One formula serves every ablation: `lerp(baseline, y, gate)`, which is exactly `y` at gate 1 and exactly the baseline at
gate 0, in every dtype. What the probe learned of two examples is compared with every tensor that a gate gets: a batch
in which the examples have other places is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ablate.errors import GatingError, NoGradientError
from ablate.gating.layouts import ExampleLayout

EVERY_ROW = slice(None)
WITHOUT_AUTOGRAD = (
    "it runs with autograd switched off (gradient checkpointing with use_reentrant=True, torch.no_grad(), or a custom "
    "autograd.Function)"
)


def apply_gate(values: Tensor, gate: Tensor, baseline: Tensor | None, layout: ExampleLayout, channels: int) -> Tensor:
    """Returns `values` where the gate is 1, the baseline where it is 0, and the straight line between.

    Args:
      values: Any shape, with the examples as `layout` says and the channels along axis `channels`.
      gate: (examples, channels) in the dtype of `values`. Of one example, everything is: no layout matters.
      baseline: (channels,), or None for zero.
    """
    axis, channels = layout.axis, channels % values.ndim
    shape = [1] * values.ndim
    shape[channels] = values.shape[channels]
    base = None if baseline is None else baseline.view(shape)
    if len(gate) == 1:
        return _mix(values, gate.view(shape), base)
    each = values.shape[axis] // len(gate)
    if each == 1:
        shape[axis] = len(gate)
        return _mix(values, gate.view(shape), base)
    parts = (len(gate), each) if layout.blocked else (each, len(gate))
    whole = values.reshape(*values.shape[:axis], *parts, *values.shape[axis + 1 :])
    shape.insert(axis, 1)
    shape[axis if layout.blocked else axis + 1] = len(gate)
    base = None if base is None else base.unsqueeze(axis)
    return _mix(whole, gate.view(shape), base).flatten(axis, axis + 1)


def _mix(values: Tensor, gate: Tensor, baseline: Tensor | None) -> Tensor:
    gate = gate.to(values.dtype)
    return values * gate if baseline is None else torch.lerp(baseline.to(values.dtype), values, gate)


@dataclass
class Seen:
    """What passed one side of a weight in one use, behind its gates: the input, or some rows of the output."""

    values: Tensor
    layout: ExampleLayout
    channels: int
    rows: slice


@dataclass
class Tap:
    """Notes what passes a weight, use by use, so that gradients with respect to it can be taken."""

    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)

    def note(self, seen: list[Seen], values: Tensor, layout: ExampleLayout, channels: int, rows: slice) -> Tensor:
        """Notes values; returns a copy for the model to go on with, which may write to it in place."""
        seen.append(Seen(values, layout, channels, rows))
        return values.clone()


@dataclass(frozen=True)
class Places:
    """Where the probe found the examples at one weight's input and output: a layout per number of places seen."""

    inside: tuple[ExampleLayout, ...] = ()
    outside: tuple[ExampleLayout, ...] = ()


@dataclass
class Gates:
    """What stands at one weight: gates (examples, channels) at its input and output, and what closed gates leave.

    Without means, closed gates leave what a zeroed weight leaves: the bias at the output, nothing elsewhere.
    """

    module: str = ""
    places: Places = Places()
    inside: Tensor | None = None
    outside: Tensor | None = None
    branch: Tensor | None = None  # closes bias and all: the end of a residual branch
    in_mean: Tensor | None = None  # (channels,), as are the others
    out_mean: Tensor | None = None
    tap: Tap | None = None

    @property
    def closed_somewhere(self) -> bool:
        """Whether any gate is set."""
        return self.inside is not None or self.outside is not None or self.branch is not None

    def close_input(self, x: Tensor, channels: int, places: Places | None = None) -> Tensor:
        """Returns the input behind its gates; `places`: of this use, where the uses of a weight differ."""
        if self.inside is None:
            return x
        layout = self._layout(x, (places or self.places).inside, len(self.inside))
        x = self._with_gradient(apply_gate(x, self.inside, self.in_mean, layout, channels), self.inside)
        return x if self.tap is None else self.tap.note(self.tap.inputs, x, layout, channels, EVERY_ROW)

    def close_output(
        self, y: Tensor, bias: Tensor | None, channels: int, rows: slice, places: Places | None = None
    ) -> Tensor:
        """Returns the output behind its gates; `rows` are the channels of the weight that `y` holds."""
        gate = self.outside if self.outside is not None else self.branch
        if gate is None:
            return y
        layout = self._layout(y, (places or self.places).outside, len(gate))
        mean = None if self.out_mean is None else self.out_mean[rows]
        if self.outside is not None:
            y = apply_gate(y, self.outside[:, rows], bias if mean is None else mean, layout, channels)
        if self.branch is not None:
            y = apply_gate(y, self.branch[:, rows], mean, layout, channels)
        y = self._with_gradient(y, gate)
        return y if self.tap is None else self.tap.note(self.tap.outputs, y, layout, channels, rows)

    def _layout(self, values: Tensor, layouts: tuple[ExampleLayout, ...], examples: int) -> ExampleLayout:
        """Returns where the examples are; raises GatingError where a tensor is none that the probe has seen."""
        if examples == 1:
            return ExampleLayout(0)
        for layout in layouts:
            if values.ndim == layout.ndim and values.shape[layout.axis] == examples * layout.each:
                return layout
        known = " or ".join(f"{layout.each} along axis {layout.axis} of {layout.ndim}" for layout in layouts)
        raise GatingError(
            f"Module {self.module!r} got a tensor of shape {tuple(values.shape)} for {examples} examples, expected as "
            f"many places per example as when the engine looked at two ({known or 'none were found'}): this batch is "
            f"run in another way (in chunks, by another path). Lower batch_size, leave it out with "
            f"exclude=[{self.module!r}], or use outputs() in mode 'weight'."
        )

    def _with_gradient(self, values: Tensor, gate: Tensor) -> Tensor:
        """Returns the values; raises where they should depend on gates that have gradients and do not."""
        if gate.requires_grad and not values.requires_grad:
            raise NoGradientError([self.module], WITHOUT_AUTOGRAD)
        return values
