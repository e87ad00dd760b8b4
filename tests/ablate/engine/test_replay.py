"""Leave-one-out gives the bits of the plain engine, whatever the model does before the ablated weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ablate
from ablate.ablation import Ablation, MeanAblation, ScaleAblation
from ablate.digits import ResidualCNN
from ablate.engine.gated_model import Speed

Randomise = Callable[[nn.Module, int], nn.Module]
AS_GIVEN = Speed(fold=False, channels_last=False)


def _plain(engine: ablate.Engine, inputs: Tensor, targets: Tensor, components: list[int] | None = None) -> Tensor:
    keep = ~np.eye(len(engine.index), dtype=bool)
    return engine.outputs(keep if components is None else keep[components], inputs, targets)


def _torchvision() -> nn.Module:
    import torchvision

    block = torchvision.models.resnet.BasicBlock  # its ReLU works in place
    model: nn.Module = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=5)
    return model


def _encoder() -> nn.Module:
    """Patches and a transformer layer of torch, which runs as one fused function where nothing forbids it."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), _Transposed(), layer, _TokenMean(), nn.Linear(8, 5))


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _TokenMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, int, int]]] = {
    "digits-residual-cnn": (lambda: ResidualCNN((4, 6, 6), 5), ["conv_filter"], (1, 16, 16)),
    "torchvision-resnet": (_torchvision, ["conv_filter"], (3, 32, 32)),
    "timm-resnet": (lambda: _timm("test_resnet"), ["conv_filter"], (3, 32, 32)),
    "timm-vit-neurons": (lambda: _timm("test_vit"), ["linear_neuron", "attention_head"], (3, 160, 160)),
    "timm-convnext": (lambda: _timm("test_convnext"), ["conv_filter", "linear_neuron"], (3, 64, 64)),
    "encoder-layer": (_encoder, ["linear_neuron", "conv_filter", "attention_head", "ffn_hidden"], (3, 8, 8)),
    "branches": (lambda: ResidualCNN((4, 6, 6), 5), ["residual_branch"], (1, 16, 16)),
}


@pytest.mark.parametrize("speed", [None, AS_GIVEN], ids=["default", "as-given"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_plain_engine_bit_for_bit(name: str, speed: Speed | None, randomise: Randomise) -> None:
    build, kinds, shape = ARCHITECTURES[name]
    model = randomise(build(), 0).eval()
    index = ablate.ComponentIndex.from_model(model, kinds)
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 4, 3, 1, 2])
    engine = ablate.Engine(model, index, speed=speed, batch_size=2)
    chosen = np.random.default_rng(0).permutation(len(index))[:24].tolist()
    expected = _plain(engine, inputs, targets, chosen)
    assert len(torch.unique(expected)) > expected.numel() // 2, "the components must matter"
    assert torch.equal(engine.leave_one_out(inputs, targets, chosen), expected)


class Step(nn.Module):
    """One step of a drawn net: (examples, 3, 4, 4) to the same; `seen` is a list that steps may add to."""

    def __init__(self, first: Step | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=first is None)
        self.next = nn.Conv2d(3, 3, 1)
        self.first = first  # a module that is then called from several places


class Conv(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class AddsInPlace(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(x)
        y += x
        z: Tensor = self.next(F.relu(y, inplace=True))
        return z


class WritesToItsInput(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        F.relu_(x)
        y: Tensor = self.conv(x) + x
        return y


class ReturnsItsInput(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        x += 0.5 * self.conv(x)
        return x


class WritesBehindVersions(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(x)
        y.data.mul_(0.5)
        x.data.add_(0.1)
        return y


class AddsToTheList(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(self.conv(x))
        return x * 0.9


class PassesOn(Step):
    """Returns its input itself, for others to write to."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        return x


class WritesToABuffer(Step):
    """Adds to a tensor that the model empties in every forward, and that later steps read."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(x)
        BOX.total.add_(y.mean(dim=(1, 2, 3), keepdim=True))
        return torch.tanh(y)


class LeavesAnAttribute(Step):
    """Leaves a new tensor where the model has put an empty one."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(x)
        BOX.left = BOX.left + y.mean(dim=(1, 2, 3), keepdim=True)
        return torch.tanh(y)


class Reads(Step):
    """Reads what was left, and uses the first step's layer again."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = x + self.conv(x) if self.first is None else self.first.conv(x)
        return y + BOX.left + BOX.total


class Box:
    """What steps share behind the back of their arguments."""

    total: Tensor
    left: Tensor


BOX = Box()


class UsesABareWeight(Step):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        weight = self.conv.weight if self.first is None else self.first.conv.weight
        y: Tensor = self.conv(x)
        return F.conv2d(x, weight, padding=1) + y


class Splits(Step):
    """Calls a module that returns a tuple of views of one tensor, and writes to one of them."""

    def __init__(self, first: Step | None) -> None:
        super().__init__(first)
        self.pair = _Pair(self.conv)

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        found = self.pair(x)
        found["parts"][0].mul_(2)
        y: Tensor = self.next(found["whole"] + found["parts"][1].mean(dim=1, keepdim=True))
        return y


class _Pair(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"whole": y, "parts": (y[:, :1], y[:, 1:]), "note": None}


STEPS: list[type[Step]] = [
    Conv,
    AddsInPlace,
    WritesToItsInput,
    ReturnsItsInput,
    WritesBehindVersions,
    AddsToTheList,
    PassesOn,
    WritesToABuffer,
    LeavesAnAttribute,
    Reads,
    UsesABareWeight,
    Splits,
]


class OddNet(nn.Module):
    """A convolution, the steps one after the other, a linear layer. Inputs (examples, 3, 4, 4)."""

    def __init__(self, steps: list[type[Step]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.steps = nn.ModuleList()
        first: Step | None = None
        for step in steps:
            self.steps.append(step(first))
            first = first or self.steps[0]  # type: ignore[assignment]
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        seen: list[Tensor] = []
        BOX.total, BOX.left = x.new_zeros(len(x), 1, 1, 1), x.new_zeros(len(x), 1, 1, 1)
        for i, step in enumerate(self.steps):
            y = step(x, seen)
            if i % 2:
                y.add_(0.2)
                y = y - 0.3 * x
            x = y
        for value in seen:
            x = x + value
        logits: Tensor = self.head(self.relu(x).mean(dim=(2, 3)) + x.amax(dim=(2, 3)))
        return logits


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 1000))
def test_odd_nets_give_the_bits_of_the_plain_engine(steps: list[type[Step]], batch_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = OddNet(steps).eval()
    index = ablate.ComponentIndex.from_model(model, ["conv_filter", "linear_neuron"])
    inputs, targets = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 3, 2])
    engine = ablate.Engine(model, index, batch_size=batch_size, speed=AS_GIVEN)
    assert torch.equal(engine.leave_one_out(inputs, targets), _plain(engine, inputs, targets))


CALLS: list[str] = []


class Counted(nn.Linear):
    """Notes that its forward ran."""

    label = ""

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(self.label)
        return super().forward(x)


def test_what_comes_before_the_weight_does_not_run() -> None:
    torch.manual_seed(0)
    layers = [Counted(2, 2) for _ in "abcd"]
    for layer, label in zip(layers, "abcd", strict=True):
        layer.label = label
    model = nn.Sequential(nn.Sequential(layers[0], nn.ReLU(), layers[1]), nn.ReLU(inplace=True), *layers[2:])
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    inputs, targets = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
    engine = ablate.Engine(model, index, example_inputs=inputs)
    CALLS.clear()
    engine.leave_one_out(inputs, targets)
    once = 2  # traced, and recorded; then replayed for every layer, and for each of its two components
    new = 4  # a batch of a new shape, and its three examples alone
    assert {label: CALLS.count(label) - once - new for label in "abcd"} == {"a": 3, "b": 6, "c": 9, "d": 12}
    CALLS.clear()
    engine.leave_one_out(inputs, targets, [5, 4])
    assert {label: CALLS.count(label) - once for label in "abcd"} == {"a": 0, "b": 0, "c": 3, "d": 3}


def test_a_component_that_nothing_reads_leaves_the_outputs_as_they_are(conv_net: nn.Module, images: Tensor) -> None:
    conv_net.unused = nn.Linear(4, 2)
    index = ablate.ComponentIndex.from_model(conv_net, ["linear_neuron"])
    targets = torch.zeros(len(images), dtype=torch.int64)
    engine = ablate.Engine(conv_net, index)
    out = engine.leave_one_out(images, targets)
    full = engine.outputs(np.ones((1, len(index)), dtype=bool), images, targets)
    dead = list(index.where(module="unused").ids)
    assert torch.equal(out[dead], full.expand(2, -1))
    assert torch.equal(out, _plain(engine, images, targets))


class PerExample(nn.Module):
    """Calls its modules once per example: another batch size, other calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.second(torch.relu(self.first(row))) for row in x])


class SpoilsWhatItGot(nn.Module):
    """Writes to the output of a module, but only where another one is ablated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.early = nn.Linear(3, 3)
        self.middle = nn.Linear(3, 1, bias=False)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.early(y)
        if not self.middle(y).any():
            y.add_(1)
        logits: Tensor = self.last(y + z)
        return logits


class EveryOtherTime(nn.Module):
    """Calls a module that does nothing in every second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.nothing = nn.Identity()
        self.last = nn.Linear(3, 3)
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        y = self.first(x)
        logits: Tensor = self.last(torch.relu(self.nothing(y) if self.times % 2 else y))
        return logits


@pytest.mark.parametrize("build", [PerExample, SpoilsWhatItGot, EveryOtherTime])
def test_a_model_whose_calls_change_is_run_as_it_is(build: type[nn.Module], randomise: Randomise) -> None:
    model = randomise(build(), 0).eval()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    inputs, targets = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3
    engine = ablate.Engine(model, index, batch_size=3, self_check=False)
    assert torch.equal(engine.leave_one_out(inputs, targets), _plain(engine, inputs, targets))


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "scale"])
def test_every_ablation_and_precision(
    ablation: str, precision: str, conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    known: dict[str, str | Ablation] = {"mean": MeanAblation((images, labels)), "scale": ScaleAblation(0.25)}
    given = known.get(ablation, ablation)
    engine = ablate.Engine(conv_net, index, precision=precision, ablation=given, batch_size=3)
    out = engine.leave_one_out(images, labels)
    assert out.dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert torch.equal(out, _plain(engine, images, labels))


@pytest.mark.slow
def test_a_compiled_model_runs_plainly(mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    inputs, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    engine = ablate.Engine(mlp, index, batch_size=4, speed=Speed(compile=True))
    assert torch.equal(engine.leave_one_out(inputs, targets), _plain(engine, inputs, targets))


def test_equals_the_reference(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    expected = ablate.reference_outputs(conv_net, index, ~np.eye(len(index), dtype=bool), images, labels)
    out = ablate.Engine(conv_net, index).leave_one_out(images, labels)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_an_error_leaves_the_engine_as_it_was(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    engine = ablate.Engine(conv_net, index, batch_size=2)
    before = engine.leave_one_out(images, labels)
    with pytest.raises(ablate.LabelError, match=r"^The label of example 6 is 7, expected a class from 0 to 2"):
        engine.leave_one_out(images, torch.tensor([0, 0, 0, 0, 0, 0, 7]))
    broken = images.clone()
    broken[5, 0, 0, 0] = float("nan")
    with pytest.raises(ablate.NonFiniteOutputError, match=r"^Output of keep row 0 on example 5 \(id '5'\) is nan"):
        engine.leave_one_out(broken, labels)
    with pytest.raises(IndexError, match=r"^Component 10 does not exist; ids are 0 to 9\.$"):
        engine.leave_one_out(images, labels, [10])
    assert torch.equal(engine.leave_one_out(images, labels), before)
    assert torch.equal(_plain(engine, images, labels), before)
