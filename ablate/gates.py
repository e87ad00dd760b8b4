"""The gates of one weight: what they do to activations, and a tap that notes what passes them.

One formula serves every ablation: `lerp(baseline, y, gate)`, which is exactly `y` at gate 1 and exactly the baseline at
gate 0, in every dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ablate.probe import Layout

EVERY_ROW = slice(None)


def apply_gate(values: Tensor, gate: Tensor, baseline: Tensor | None, layout: Layout, channels: int) -> Tensor:
    """Returns `values` where the gate is 1, the baseline where it is 0, and the straight line between.

    Args:
      values: Any shape, with the examples as `layout` says and the channels along axis `channels`.
      gate: (examples, channels) in the dtype of `values`.
      baseline: (channels,), or None for zero.
    """
    axis, channels = layout.axis, channels % values.ndim
    each = values.shape[axis] // len(gate)
    shape = [1] * values.ndim
    shape[channels] = values.shape[channels]
    base = None if baseline is None else baseline.view(shape)
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
    layout: Layout
    channels: int
    rows: slice


@dataclass
class Tap:
    """Notes what passes a weight, use by use, so that gradients with respect to it can be taken."""

    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)

    def note(self, seen: list[Seen], values: Tensor, layout: Layout | None, channels: int, rows: slice) -> Tensor:
        """Notes values; returns a copy for the model to go on with, which may write to it in place."""
        seen.append(Seen(values, cast(Layout, layout), channels, rows))
        return values.clone()


@dataclass
class Gates:
    """What stands at one weight: gates (examples, channels) at its input and output, and what closed gates leave.

    Without means, closed gates leave what a zeroed weight leaves: the bias at the output, nothing elsewhere.
    """

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

    def close_input(self, x: Tensor, layout: Layout | None, channels: int) -> Tensor:
        """Returns the input behind its gates."""
        if self.inside is None:
            return x
        x = apply_gate(x, self.inside, self.in_mean, cast(Layout, layout), channels)
        return x if self.tap is None else self.tap.note(self.tap.inputs, x, layout, channels, EVERY_ROW)

    def close_output(self, y: Tensor, bias: Tensor | None, layout: Layout | None, channels: int, rows: slice) -> Tensor:
        """Returns the output behind its gates; `rows` are the channels of the weight that `y` holds."""
        mean = None if self.out_mean is None else self.out_mean[rows]
        if self.outside is not None:
            baseline = bias if mean is None else mean
            y = apply_gate(y, self.outside[:, rows], baseline, cast(Layout, layout), channels)
        if self.branch is not None:
            y = apply_gate(y, self.branch[:, rows], mean, cast(Layout, layout), channels)
        if self.tap is not None and (self.outside is not None or self.branch is not None):
            y = self.tap.note(self.tap.outputs, y, layout, channels, rows)
        return y
