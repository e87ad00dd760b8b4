"""What every component kind promises, asked of every registered kind on every small net that has it.

A new kind needs nothing here but a net that has such components, if none of these has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]

CLASSES = 4
EXAMPLES = 6


class Shared(nn.Module):
    """One convolution used twice, two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(torch.relu(self.conv(x)))))
        x = torch.relu(self.first(x.mean(dim=(2, 3))))
        logits: Tensor = self.head(torch.relu(self.second(x)))
        return logits


class Attention(nn.Module):
    """A patch convolution and a transformer layer, whose attention never calls the forward of its `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class Transformer(nn.Module):
    """A residual block of convolutions, then a transformer layer with its norms first: every kind of component."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.block = Residual(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layer(self.block(self.patch(x)).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


class Dimensions(nn.Module):
    """Convolutions along one, two and three axes, plain and transposed, in one group and in several."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
        self.grouped = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.volume = nn.Conv3d(1, 2, (3, 3, 3), stride=2)
        self.volume_up = nn.ConvTranspose3d(2, 2, 2, bias=False)
        self.signal = nn.Conv1d(2, 6, 5, stride=3, groups=2)
        self.paired = nn.ConvTranspose1d(6, 3, 3, groups=3)
        self.depthwise = nn.ConvTranspose1d(3, 3, 2, groups=3, bias=False)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.up(x))))
        x = torch.relu(self.volume_up(torch.relu(self.volume(x[:, None]))))
        x = torch.relu(self.paired(torch.relu(self.signal(x.flatten(2)))))
        logits: Tensor = self.head(torch.relu(self.depthwise(x)).mean(dim=2))
        return logits


class Residual(nn.Module):
    """Two convolutions beside a convolution as shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class Gated(nn.Module):
    """Attention with separate keys and values, and a gated feed-forward network, each beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 4, kdim=3, vdim=3, batch_first=True)
        self.mlp = GatedMLP(8, 5)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, pixels, pixels, need_weights=False)[0]
        x = x + self.mlp(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.Flatten(),
        nn.Linear(5 * 16, CLASSES, bias=False),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "attention": Attention,
    "grouped": _grouped,
    "dimensions": Dimensions,
    "transformer": Transformer,
    "gated": Gated,
}


def _has(net: str, kind: str) -> bool:
    try:
        return len(ablate.ComponentIndex.from_model(NETS[net](), [kind])) > 0
    except ablate.SelectionError:
        return False


PAIRS = [f"{net} {kind}" for net in NETS for kind in ablate.component_kinds() if _has(net, kind)]


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A net and a kind of component that it has."""
    net, kind = str(request.param).split()
    return net, kind


@pytest.fixture
def model(pair: tuple[str, str], randomise: Randomise) -> nn.Module:
    return randomise(NETS[pair[0]](), 1).eval()


@pytest.fixture
def index(pair: tuple[str, str], model: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(model, [pair[1]])


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(EXAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def targets() -> Tensor:
    return torch.arange(EXAMPLES) % CLASSES


@pytest.mark.parametrize("kind", ablate.component_kinds())
def test_some_net_has_the_kind(kind: str) -> None:
    assert any(_has(net, kind) for net in NETS), f"add a net with components of kind {kind!r} to NETS"


def test_ids_count_from_zero_and_names_are_distinct(index: ablate.ComponentIndex) -> None:
    assert [c.id for c in index] == list(range(len(index)))
    assert len({c.name for c in index}) == len(index)


def test_every_component_is_a_slice_of_a_parameter(index: ablate.ComponentIndex, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    for c in index:
        part = parameters[c.parameter].narrow(c.axis, c.start, c.stop - c.start)
        assert part.numel() == c.n_parameters > 0
        assert c.module in modules
        assert c.port in ("in", "out")
        assert c.kind in ablate.component_kinds()


def test_components_do_not_overlap(index: ablate.ComponentIndex, model: nn.Module) -> None:
    hits = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for c in index:
        hits[c.parameter].narrow(c.axis, c.start, c.stop - c.start).add_(1)
    assert all(float(count.max()) <= 1 for count in hits.values())
    assert sum(int(count.sum()) for count in hits.values()) == index.table()["n_parameters"].sum()


def test_listing_is_deterministic_and_changes_nothing(
    index: ablate.ComponentIndex, model: nn.Module, untouched: Untouched
) -> None:
    kinds = [index.ports[0].kind]
    with untouched(model):
        assert ablate.ComponentIndex.from_model(model, kinds) == index
    assert ablate.ComponentIndex.from_model(copy.deepcopy(model).train(), kinds).hash == index.hash
    assert ablate.ComponentIndex.from_json(index.to_json()).hash == index.hash


def test_every_parameter_of_the_model_is_listed_or_accounted_for(
    index: ablate.ComponentIndex, model: nn.Module
) -> None:
    listed = {port.module for port in index.ports}
    accounted = set(index.left_out()["module"])
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert listed | accounted >= owners
    assert not listed & accounted


def test_the_engine_equals_the_reference(
    index: ablate.ComponentIndex, model: nn.Module, inputs: Tensor, targets: Tensor
) -> None:
    one_by_one = ~np.eye(len(index), dtype=bool)
    random_rows = ablate.KeepPlan(len(index), 6, 0.3, seed=3).take(0, 6)
    keep = np.concatenate([one_by_one, random_rows, np.zeros((1, len(index)), dtype=bool)])
    exact = ablate.reference_outputs(model.double(), index, keep, inputs.double(), targets)
    outputs = ablate.Engine(model, index, precision="float64", batch_size=4).outputs(keep, inputs, targets)
    torch.testing.assert_close(outputs, exact, rtol=1e-10, atol=1e-10)
    kept = ablate.Engine(model, index).outputs(~keep[-1:], inputs.double(), targets)
    assert float((outputs - kept).abs().max()) > 1e-3, "some ablation must matter"


def test_ablated_equals_the_engine_and_restores(
    index: ablate.ComponentIndex, model: nn.Module, inputs: Tensor, targets: Tensor, untouched: Untouched
) -> None:
    engine = ablate.Engine(model, index)
    for seed in range(3):
        selection = index.everything().sample(len(index) // 2, seed)
        with untouched(model), ablate.ablated(model, selection), torch.no_grad():
            outputs = ablate.Margin()(model(inputs), targets)
        torch.testing.assert_close(outputs, engine.outputs(selection.keep()[None], inputs, targets)[0])


def test_ablating_everything_leaves_nothing_of_the_weights(index: ablate.ComponentIndex, model: nn.Module) -> None:
    with ablate.ablated(model, index.everything()):
        parameters = dict(model.named_parameters())
        assert not any(parameters[port.parameter].any() for port in index.ports if port.count)
        modules = dict(model.named_modules())
        biases = [modules[port.module].bias for port in index.ports if port.with_bias]
        assert not any(bias.any() for bias in biases if isinstance(bias, Tensor))
