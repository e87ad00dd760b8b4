"""Small nets that use their weights in every odd way, and a slow gradient that anyone can check."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablate
from ablate.outputs import get_output

Case = tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor, str]

ALL_KINDS = ["qkv_neuron", "attention_head", "ffn_hidden", "residual_branch", "conv_filter", "linear_neuron"]
CLASSES, EXAMPLES, LENGTH, WIDTH = 4, 5, 6, 8


class Grouped(nn.Module):
    """A grouped convolution, a depthwise one with its norm, one of one pixel without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, groups=3)
        self.depthwise = nn.Conv2d(6, 12, 3, groups=6, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.pixel = nn.Conv2d(12, 5, 1, bias=False)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depthwise(F.relu(self.grouped(x)))))
        logits: Tensor = self.head(F.gelu(self.pixel(x)).mean(dim=(2, 3)))
        return logits


class Norms(nn.Module):
    """Batch norms of which only the first may be folded: the others are used twice, or not alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.read_twice, self.bare = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(3) for _ in range(3))
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.twice(x)))
        x = F.relu(self.norm2(self.twice(x)))
        y = self.read_twice(x)
        x = F.relu(self.norm3(y)) + y
        logits: Tensor = self.head(self.bare(x).amax(dim=(2, 3)))
        return logits


class Shares(nn.Module):
    """Norms that must not be folded: of two convolutions with one weight, of one under two norms, one of two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.again, self.left, self.right = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.two.weight = self.one.weight
        self.norm1, self.norm2, self.norm3, self.norm4, self.both = (nn.BatchNorm2d(3) for _ in range(5))
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm2(self.two(F.gelu(self.norm1(self.one(x))))))
        x = F.gelu(self.norm4(self.again(F.gelu(self.norm3(self.again(x))))))
        x = F.gelu(self.both(self.left(x))) + F.gelu(self.both(self.right(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class TwoLayouts(nn.Module):
    """A weight used by functions only, time-major first, then batch first, then on one row per example."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.linear(x.transpose(0, 1), self.fc.weight, self.fc.bias)).transpose(0, 1)
        x = F.gelu(F.linear(x, self.fc.weight, self.fc.bias))
        x = F.gelu(F.linear(x.mean(dim=1), self.fc.weight, self.fc.bias))
        logits: Tensor = self.head(x)
        return logits


class Reused(nn.Module):
    """One module called twice, on (B * T, C) and on (B, C), and one convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.conv(x))))
        rows = F.gelu(self.fc(x.mean(dim=3).transpose(1, 2).reshape(-1, 3)))
        x = F.gelu(self.fc(rows.view(len(x), -1, 3).mean(dim=1)))
        logits: Tensor = self.head(x)
        return logits


class Tied(nn.Module):
    """Two layers with one weight and two biases, and a third use of it that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.two(F.gelu(self.one(x))))
        x = F.gelu(F.linear(x, self.two.weight)).mean(dim=1)
        logits: Tensor = self.head(x)
        return logits


class Functional(nn.Module):
    """Weights of layers whose forward is never called: by position, by keyword, without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.hidden = nn.Linear(5, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.conv2d(x, weight=self.conv.weight, bias=self.conv.bias, stride=2))
        x = F.gelu(F.linear(x.mean(dim=(2, 3)), self.hidden.weight))
        return F.linear(input=x, weight=self.head.weight, bias=self.head.bias)


class ExampleLayout(nn.Module):
    """Two linear layers over (B, T, C) inputs, brought into a layout in which the examples are somewhere else."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.up, self.down, self.head = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        examples, length = x.shape[:2]
        if self.layout in ("time-major", "interleaved"):
            x = x.transpose(0, 1)
        if self.layout in ("blocked", "interleaved"):
            x = x.reshape(examples * length, WIDTH)
        if self.layout == "windows":
            x = x.view(examples * 3, 2, WIDTH)
        if self.layout == "windows in turn":
            x = x.view(examples, 3, 2, WIDTH).transpose(0, 1).reshape(examples * 3, 2, WIDTH)
        x = x + self.down(F.gelu(self.up(x)))
        if self.layout == "interleaved":
            x = x.view(length, examples, WIDTH)
        if self.layout == "windows in turn":
            x = x.view(3, examples, 2, WIDTH).transpose(0, 1)
        if self.layout in ("time-major", "interleaved"):
            x = x.transpose(0, 1)
        logits: Tensor = self.head(x.reshape(examples, length, WIDTH).mean(dim=1))
        return logits


class Attending(nn.Module):
    """`nn.MultiheadAttention` in the forms it comes in; it never calls the forward of its `out_proj`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        other = 3 if form == "other key widths" else None
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, batch_first=form != "time-major", bias=form != "no bias", kdim=other, vdim=other
        )
        self.queries = nn.Parameter(torch.zeros(2, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.form == "weights"
        if self.form == "time-major":
            x = x.transpose(0, 1)
            x = (x + self.attention(x, x, x, need_weights=weights)[0]).transpose(0, 1)
        elif self.form in ("queries", "other key widths"):
            keys = x[..., :3] if self.form == "other key widths" else x
            x = self.attention(self.queries.expand(len(x), -1, -1), keys, keys, need_weights=weights)[0]
        else:
            hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if self.form == "causal" else None
            padding = (x.abs().sum(dim=2) > 9) if self.form == "padding" else None
            if padding is not None:
                padding[:, 0] = False
            x = x + self.attention(x, x, x, attn_mask=hidden, key_padding_mask=padding, need_weights=weights)[0]
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class Encoder(nn.Module):
    """Two `nn.TransformerEncoderLayer`s, whose fused path reads weights behind every module's back."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x)[:, 0])
        return logits


class Block(nn.Module):
    """A residual block with a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(x))
        return y


class Branches(nn.Module):
    """Two residual branches, whose biases go with them, a convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def _layout(name: str) -> Callable[[], nn.Module]:
    return lambda: ExampleLayout(name)


def _attending(form: str) -> Callable[[], nn.Module]:
    return lambda: Attending(form)


LAYOUTS = ("time-major", "blocked", "interleaved", "windows", "windows in turn")
FORMS = ("plain", "time-major", "weights", "queries", "other key widths", "causal", "padding", "no bias")

ODD_NETS: dict[str, Callable[[], nn.Module]] = {
    "grouped": Grouped,
    "norms": Norms,
    "shares": Shares,
    "two layouts": TwoLayouts,
    "reused": Reused,
    "tied": Tied,
    "functional": Functional,
    "encoder": Encoder,
    "branches": Branches,
    **{f"layout {name}": _layout(name) for name in LAYOUTS},
    **{f"attention {form}": _attending(form) for form in FORMS},
}
OF_IMAGES = ("grouped", "norms", "shares", "reused", "functional", "branches")


@pytest.fixture(params=ODD_NETS)
def odd_case(request: pytest.FixtureRequest, randomise: Callable[[nn.Module, int], nn.Module]) -> Case:
    """A net that uses its weights in an odd way, an index of all it has, five inputs and targets, the output."""
    model = randomise(ODD_NETS[request.param](), 1).eval()
    index = ablate.ComponentIndex.from_model(model, ALL_KINDS)
    shape = (3, 8, 8) if request.param in OF_IMAGES else (LENGTH, WIDTH)
    inputs = torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(2))
    return model, index, inputs, torch.arange(EXAMPLES) % CLASSES, "margin"


def _some_keep(index: ablate.ComponentIndex, rows: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    keep: npt.NDArray[np.bool_] = np.random.default_rng(seed).random((rows, len(index))) >= 0.1
    first = 0
    for number, port in enumerate(index.ports):
        keep[number % rows, first + number % port.count] = port.count == 1 and number % 3 > 0
        first += port.count
    return keep


@pytest.fixture(scope="session")
def some_keep() -> Callable[..., npt.NDArray[np.bool_]]:
    """`some_keep(index, rows, seed=0)`: a tenth ablated, some of every module but a few that are one component."""
    return _some_keep


def _slow_gradients(
    model: nn.Module, index: ablate.ComponentIndex, gates: Tensor, inputs: Tensor, targets: Tensor, output: str
) -> tuple[Tensor, Tensor]:
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    outputs, gradients = [], []
    for example in range(len(inputs)):
        gate = gates[example].double().clone().requires_grad_()
        changed: dict[str, Tensor] = {}
        first = 0
        for port in index.ports:
            mine = gate[first : first + port.count].repeat_interleave(port.width)
            names = [port.parameter]
            if port.kind == "residual_branch" and f"{port.module}.bias" in parameters:
                names.append(f"{port.module}.bias")
            for name in names:
                value = changed.get(name, parameters[name])
                shape = [1] * value.ndim
                shape[port.axis if name == port.parameter else 0] = -1
                changed[name] = value * mine.view(shape)
            first += port.count
        logits = torch.func.functional_call(model, changed, (inputs[example : example + 1],))
        value = get_output(output)(logits, targets[example : example + 1]).squeeze(0)
        outputs.append(value.detach())
        gradients.append(torch.autograd.grad(value, gate)[0])
    return torch.stack(outputs), torch.stack(gradients)


@pytest.fixture(scope="session")
def slow_gradients() -> Callable[..., tuple[Tensor, Tensor]]:
    """`slow_gradients(model, index, gates, inputs, targets, output)`: weights times gates, one example at a time."""
    return _slow_gradients
