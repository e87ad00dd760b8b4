"""The engine equals the reference on networks nobody thought of: random structures, keep-vectors and batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ablate


@dataclass(frozen=True)
class Conv:
    """A drawn convolution: `groups` groups of `width` channels each; depthwise where both sides have width 1."""

    groups: int
    width: int
    bias: bool
    norm: bool
    stride: int


@dataclass(frozen=True)
class Design:
    """A drawn network: convolutions, then linear layers of one width, the second of which may be special."""

    convs: tuple[Conv, ...]
    biases: tuple[bool, ...]
    second: str  # own: a layer of its own; reused: the first module again; tied: the first one's weight
    classes: int
    seed: int


class DrawnNet(nn.Module):
    """What a Design describes. Inputs (examples, 2, 6, 6)."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        channels = 2
        for conv in design.convs:
            groups = conv.groups if channels % conv.groups == 0 else channels  # else depthwise
            width = groups * conv.width
            self.convs.append(nn.Conv2d(channels, width, 3, conv.stride, 1, groups=groups, bias=conv.bias))
            self.norms.append(nn.BatchNorm2d(width) if conv.norm else nn.Identity())
            channels = width
        self.first = nn.Linear(channels, channels, bias=design.biases[0])
        self.second = self.first if design.second == "reused" else nn.Linear(channels, channels, bias=design.biases[1])
        if design.second == "tied":
            self.second.weight = self.first.weight
        self.head = nn.Linear(channels, design.classes, bias=design.biases[2])

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.1)
        x = F.leaky_relu(self.first(x.mean(dim=(2, 3))), 0.1)
        logits: Tensor = self.head(F.leaky_relu(self.second(x), 0.1))
        return logits


convs = st.builds(
    Conv, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([1, 2])
)
designs = st.builds(
    Design,
    st.lists(convs, max_size=3).map(tuple),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["own", "reused", "tied"]),
    st.integers(2, 4),
    st.integers(0, 10_000),
)


def _build(design: Design) -> nn.Module:
    model = DrawnNet(design)
    generator = torch.Generator().manual_seed(design.seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                fresh = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(fresh.abs() + 0.5 if name.endswith("running_var") else fresh)
    return model.eval()


@given(
    designs,
    st.sampled_from([("conv_filter", "linear_neuron"), ("linear_neuron",)]),
    st.integers(1, 6),
    st.integers(1, 7),
    st.floats(0.0, 1.0),
)
def test_equals_the_reference(
    design: Design, kinds: tuple[str, ...], examples: int, batch_size: int, ablate_fraction: float
) -> None:
    model = _build(design)
    index = ablate.ComponentIndex.from_model(model, kinds)
    generator = np.random.default_rng(design.seed)
    keep = generator.random((3, len(index))) >= ablate_fraction
    inputs = torch.tensor(generator.standard_normal((examples, 2, 6, 6)), dtype=torch.float32)
    targets = torch.tensor(generator.integers(0, design.classes, examples))

    expected = ablate.reference_outputs(model, index, keep, inputs, targets)
    outputs = ablate.Engine(model, index, batch_size=batch_size).outputs(keep, inputs, targets)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    exact = ablate.reference_outputs(model.double(), index, keep, inputs.double(), targets)
    outputs = ablate.Engine(model, index, batch_size=batch_size, precision="float64").outputs(keep, inputs, targets)
    torch.testing.assert_close(outputs, exact, rtol=1e-10, atol=1e-10 * float(exact.abs().max()))


@given(designs)
def test_a_shared_weight_is_listed_once_and_gated_wherever_it_is_used(design: Design) -> None:
    model = _build(design)
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    modules = [port.module for port in index.ports]
    assert modules == (["first", "second", "head"] if design.second == "own" else ["first", "head"])
    width = model.get_parameter("first.weight").shape[0]
    with ablate.ablated(model, index.where(module="first")):
        assert not model.get_parameter("first.weight").any()
        second = model.get_submodule("second")
        assert isinstance(second, nn.Linear)
        assert bool(second.weight.any()) == (design.second == "own")
    assert len(index) == width * (len(modules) - 1) + design.classes
