"""Weight gating, activation gating, gradients and the reference agree on networks nobody thought of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ablate

KINDS = (
    "qkv_neuron",
    "attention_head",
    "ffn_hidden",
    "residual_branch",
    "conv_filter",
    "linear_neuron",
    "linear_input",
)
CLASSES = 3


@dataclass(frozen=True)
class Step:
    """One drawn step of a network over (B, T, C) tokens."""

    what: str  # attention, mlp, linear, again (the last linear once more), functional
    bias: bool
    layout: str  # how the tokens lie while the step runs


@dataclass(frozen=True)
class Design:
    """A drawn network: a convolution with or without norm and groups, then steps over its places as tokens."""

    groups: int
    bias: bool
    norm: str
    steps: tuple[Step, ...]
    seed: int


class Drawn(nn.Module):
    """What a Design describes. Inputs (examples, 2, 4, 4)."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design = design
        self.conv = nn.Conv2d(2, 4, 3, 2, 1, groups=design.groups, bias=design.bias)
        self.norm = nn.BatchNorm2d(4) if design.norm != "none" else nn.Identity()
        self.steps = nn.ModuleList(_part(step) for step in design.steps)
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x = self.norm(y)
        if self.design.norm == "read twice":
            x = x + y
        x = self.shared(F.gelu(x).flatten(2).transpose(1, 2))
        for step, part in zip(self.design.steps, self.steps, strict=True):
            x = _arranged(x, step.layout, partial(self._run, step, part))
        logits: Tensor = self.head(x.mean(dim=1))
        return logits

    def _run(self, step: Step, part: nn.Module, x: Tensor) -> Tensor:
        if isinstance(part, nn.MultiheadAttention):
            mixed: Tensor = part(x, x, x, need_weights=False)[0]
            return x + mixed
        if step.what == "again":
            return F.gelu(self.shared(x))
        if isinstance(part, nn.Linear) and step.what == "functional":
            return F.gelu(F.linear(x, part.weight, part.bias))
        y: Tensor = x + part(x)
        return y


def _part(step: Step) -> nn.Module:
    if step.what == "attention":
        return nn.MultiheadAttention(4, 2, bias=step.bias, batch_first=step.layout != "time-major")
    if step.what == "mlp":
        return nn.Sequential(nn.Linear(4, 5, bias=step.bias), nn.GELU(), nn.Linear(5, 4, bias=step.bias))
    return nn.Identity() if step.what == "again" else nn.Linear(4, 4, bias=step.bias)


def _arranged(x: Tensor, layout: str, run: Callable[[Tensor], Tensor]) -> Tensor:
    examples, length, width = x.shape
    if layout == "time-major":
        return run(x.transpose(0, 1)).transpose(0, 1)
    if layout == "windows":
        return run(x.reshape(examples * 2, length // 2, width)).reshape(x.shape)
    if layout == "windows in turn":
        y = x.view(examples, 2, length // 2, width).transpose(0, 1)
        y = run(y.reshape(examples * 2, length // 2, width)).view(y.shape)
        return y.transpose(0, 1).reshape(x.shape)
    return run(x)


steps = st.builds(
    Step,
    st.sampled_from(["attention", "mlp", "linear", "again", "functional"]),
    st.booleans(),
    st.sampled_from(["batch first", "time-major", "windows", "windows in turn"]),
)
designs = st.builds(
    Design,
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from(["none", "norm", "read twice"]),
    st.lists(steps, max_size=3).map(tuple),
    st.integers(0, 10_000),
)


def _build(design: Design) -> nn.Module:
    model = Drawn(design)
    generator = torch.Generator().manual_seed(design.seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                fresh = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(fresh.abs() + 0.5 if name.endswith("running_var") else 0.5 * fresh)
    return model.eval()


@given(designs, st.permutations(KINDS), st.integers(1, 5), st.integers(1, 9), st.floats(0.0, 1.0))
def test_all_ways_agree(
    design: Design, kinds: list[str], examples: int, batch_size: int, ablate_fraction: float
) -> None:
    model = _build(design).double()
    index = ablate.ComponentIndex.from_model(model, list(dict.fromkeys([*kinds[:3], "conv_filter"])))
    generator = np.random.default_rng(design.seed)
    keep = generator.random((3, len(index))) >= ablate_fraction
    inputs = torch.tensor(generator.standard_normal((examples, 2, 4, 4)))
    targets = torch.tensor(generator.integers(0, CLASSES, examples))
    data = inputs, targets

    expected = ablate.reference_outputs(model, index, keep, *data)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10 * max(1.0, float(expected.abs().max()))}
    weights, gated = (
        ablate.Engine(model, index, precision="float64", mode=mode, batch_size=batch_size)
        for mode in ("weight", "activation")
    )
    torch.testing.assert_close(weights.outputs(keep, *data), expected, **close)
    torch.testing.assert_close(gated.outputs(keep, *data), expected, **close)

    gates = torch.tensor(generator.uniform(-1, 2, (examples, len(index))))
    outputs, gradients = gated.gate_gradients(gates, *data)
    torch.testing.assert_close(weights.gated_outputs(gates, *data).diagonal(), outputs, **close)
    along = torch.tensor(generator.standard_normal(gates.shape))
    up, down = (gated.example_outputs(gates + sign * 1e-6 * along, *data) for sign in (1, -1))
    slope = (gradients * along).sum(dim=1)
    torch.testing.assert_close((up - down) / 2e-6, slope, rtol=1e-4, atol=1e-5 * max(1.0, float(slope.abs().max())))
