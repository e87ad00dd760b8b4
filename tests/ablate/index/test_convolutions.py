"""Filters of convolutions of any dimension: where they are in the weight, and that zeroing them is what gates do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.ablation import MeanAblation
from ablate.engine.activation_paths import conductance
from ablate.index.convolutions import filters_of, per_channel

Randomise = Callable[[nn.Module, int], nn.Module]
Convolution = nn.modules.conv._ConvNd  # torch names no public base of them

LAYERS: dict[str, tuple[Convolution, tuple[int, ...]]] = {
    "Conv1d": (nn.Conv1d(4, 6, 3), (9,)),
    "Conv1d in groups": (nn.Conv1d(4, 6, 3, groups=2, bias=False), (9,)),
    "Conv1d, circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (9,)),
    "Conv3d": (nn.Conv3d(4, 6, 2), (3, 4, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (5,)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3), (5, 4)),
    "ConvTranspose2d in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4)),
    "ConvTranspose2d, one channel a group": (nn.ConvTranspose2d(4, 2, 3, groups=2), (5, 4)),
    "ConvTranspose3d, depthwise": (nn.ConvTranspose3d(4, 4, 2, groups=4, bias=False), (3, 3, 3)),
}
FILTERS = dict.fromkeys(LAYERS, 6) | {
    "ConvTranspose2d in groups": 3,  # each makes a channel of both groups
    "ConvTranspose2d, one channel a group": 2,
    "ConvTranspose3d, depthwise": 4,
}


class Net(nn.Module):
    def __init__(self, layer: Convolution) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.layer(x)).flatten(2).mean(dim=2))
        return logits


@pytest.fixture(params=list(LAYERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net(name: str, randomise: Randomise) -> nn.Module:
    return randomise(Net(copy.deepcopy(LAYERS[name][0])), 1).eval()  # one of its own: tests change dtypes


@pytest.fixture
def inputs(name: str) -> Tensor:
    return torch.randn(5, 4, *LAYERS[name][1], generator=torch.Generator().manual_seed(2))


LABELS = torch.tensor([0, 1, 2, 2, 1])


def test_filters_are_the_default_components(name: str, net: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(net)
    assert {(port.kind, port.module) for port in index.ports} == {("conv_filter", "layer")}
    assert len(index) == FILTERS[name]


def test_a_filter_makes_its_channels_and_no_other(name: str, net: nn.Module, inputs: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(net, ["conv_filter"])
    layer = net.get_submodule("layer")
    channels = layer(inputs).movedim(1, 0)
    bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros(len(channels))
    made = np.zeros(len(channels), dtype=int)
    for component in range(len(index)):
        with ablate.ablated(net, index.select([component])):
            without = layer(inputs).movedim(1, 0)
        changed = [c for c in range(len(channels)) if not torch.equal(without[c], channels[c])]
        made[changed] += 1
        for c in changed:
            torch.testing.assert_close(without[c], bias[c].expand_as(without[c]))
    assert made.tolist() == [1] * len(channels)


@pytest.mark.parametrize("kind", ["conv_filter", "layer"])
def test_gates_and_means_of_weights_and_activations_agree(kind: str, name: str, net: nn.Module, inputs: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(net, [kind])
    keep = np.concatenate([~np.eye(len(index), dtype=bool), ablate.KeepPlan(len(index), 4, 0.4, 0).take(0, 4)])
    for ablation in ("zero", MeanAblation(inputs)):
        found = {
            mode: ablate.Engine(net, index, precision="float64", mode=mode, ablation=ablation).outputs(
                keep, inputs, LABELS
            )
            for mode in ("weight", "activation")
        }
        torch.testing.assert_close(found["weight"], found["activation"], rtol=1e-10, atol=1e-10)
        if ablation == "zero":
            literal = ablate.reference_outputs(net.double(), index, keep, inputs.double(), LABELS)
            torch.testing.assert_close(found["weight"], literal, rtol=1e-10, atol=1e-10)
            net.float()


def test_a_mean_is_the_mean_of_the_channel(name: str, net: nn.Module, inputs: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(net, ["conv_filter"])
    engine = ablate.Engine(net, index, "logit", precision="float64", ablation=MeanAblation(inputs))
    net.double()
    with torch.no_grad():
        layer = net.get_submodule("layer")(inputs.double())
        means = layer.flatten(2).mean(dim=(0, 2))
        constant = means.view(1, -1, *[1] * (layer.ndim - 2)).expand_as(layer)
        logits = net.get_submodule("head")(torch.tanh(constant).flatten(2).mean(dim=2))
    found = engine.outputs(np.zeros((1, len(index)), dtype=bool), inputs, LABELS)[0]
    torch.testing.assert_close(found, logits.gather(1, LABELS[:, None])[:, 0])


def test_gradients_are_those_of_finite_differences(name: str, net: nn.Module, inputs: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(net, ["conv_filter"])
    engine = ablate.Engine(net, index, "logit", precision="float64")
    gates = torch.rand(5, len(index), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, slopes = engine.gate_gradients(gates, inputs, LABELS)
    for component in range(len(index)):
        step = torch.zeros_like(gates)
        step[:, component] = 1e-5
        up, down = (engine.example_outputs(gates + s, inputs, LABELS) for s in (step, -step))
        torch.testing.assert_close(slopes[:, component], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_conductance_along_the_path_adds_up_to_the_difference(name: str, net: nn.Module, inputs: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(net, ["conv_filter"])
    engine = ablate.Engine(net, index, "logit", precision="float64")
    found = conductance(engine, inputs, LABELS, points=np.linspace(0, 1, 80).tolist())
    whole = torch.ones(5, len(index), dtype=torch.float64)
    at_input, at_zero = (engine.example_outputs(whole, x, LABELS) for x in (inputs, torch.zeros_like(inputs)))
    torch.testing.assert_close(found.sum(dim=1), at_input - at_zero, atol=3e-2, rtol=0)


def test_values_of_components_become_those_of_channels() -> None:
    values = torch.tensor([[1.0, 2.0]])
    assert per_channel(values, 1, 2).tolist() == [[1, 2]]
    assert per_channel(values, 3, 6).tolist() == [[1, 1, 1, 2, 2, 2]]
    assert per_channel(values, 1, 6).tolist() == [[1, 2, 1, 2, 1, 2]]
    assert per_channel(values, 5, 2).tolist() == [[1, 2]]  # rows of a group are the filter of its only channel
    assert filters_of(nn.Linear(2, 2)) is None
