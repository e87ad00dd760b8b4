"""What closed gates leave: nothing of the weights, a mean that hooks find too, or a share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablate
from ablate.ablation import Ablation, MeanAblation, ScaleAblation, ZeroAblation, get_ablation
from ablate.gating.means import mean_activations

Case = tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor, str]
SomeKeep = Callable[..., npt.NDArray[np.bool_]]
Slow = Callable[..., tuple[Tensor, Tensor]]


def _assert_close(got: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert got.shape == expected.shape
    difference = float((got - expected).abs().max()) / float(expected.abs().max())
    assert difference <= relative, difference


def _both(model: nn.Module, index: ablate.ComponentIndex, ablation: Ablation, *data: Any) -> Tensor:
    """Returns the outputs, after checking that weight and activation gating agree on them."""
    by_weights = ablate.Engine(model, index, precision="float64", ablation=ablation, mode="weight")
    outputs = by_weights.outputs(*data)
    by_gates = ablate.Engine(model, index, precision="float64", ablation=ablation, mode="activation", batch_size=3)
    _assert_close(by_gates.outputs(*data), outputs)
    return outputs


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0, 0.0, 1.0])
def test_scale_is_a_factor_of_the_weights(
    factor: float, odd_case: Case, some_keep: SomeKeep, slow_gradients: Slow
) -> None:
    model, index, inputs, targets, output = odd_case
    keep = some_keep(index, len(inputs))
    gates = torch.where(torch.tensor(keep), 1.0, factor).double()
    expected, _ = slow_gradients(model, index, gates, inputs, targets, output)
    _assert_close(_both(model, index, ScaleAblation(factor), keep, inputs, targets).diagonal(), expected)
    engine = ablate.Engine(model, index, precision="float64")
    _assert_close(engine.gated_outputs(gates, inputs, targets).diagonal(), expected)


def test_zero_is_the_reference(odd_case: Case, some_keep: SomeKeep) -> None:
    model, index, inputs, targets, output = odd_case
    keep = some_keep(index, 4)
    exact = copy.deepcopy(model).double()
    expected = ablate.reference_outputs(exact, index, keep, inputs.double(), targets, output)
    _assert_close(_both(model, index, ZeroAblation(), keep, inputs, targets), expected)


class Means(nn.Module):
    """Every form of a mean: conv and norm, conv without bias, hidden units, heads, packed rows, one head of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.patch = nn.Conv2d(4, 8, 4, 4, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(F.relu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def _by_hooks(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Returns the mean of what modules give, ` in` of what they get, taken by hooks; attention computed by hand."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, got: tuple[Tensor, ...], gave: Any) -> None:
            if isinstance(gave, Tensor):
                axis = 1 if gave.ndim == 4 else -1
                seen[name] = gave.movedim(axis, -1).flatten(0, -2).mean(dim=0)
                seen[f"{name} in"] = got[0].movedim(axis, -1).flatten(0, -2).mean(dim=0)
            else:
                seen[f"{name} x"] = got[0]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    attention: Any = model.get_submodule("attention")
    with torch.no_grad():
        packed = F.linear(seen["attention x"], attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (part.reshape(*part.shape[:2], 2, 4).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        mixed = (torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v).transpose(1, 2).flatten(2)
        seen["attention"] = packed.flatten(0, 1).mean(dim=0)
        seen["attention.out_proj in"] = mixed.flatten(0, 1).mean(dim=0)
        seen["attention.out_proj"] = attention.out_proj(mixed).flatten(0, 1).mean(dim=0)
    return seen


def _with_means(model: nn.Module, component: ablate.Component, means: dict[str, Tensor]) -> nn.Module:
    """Returns a copy in which one component's weights are zero and biases hold its mean."""
    changed = copy.deepcopy(model)
    part = slice(component.start, component.stop)
    module: Any = changed.get_submodule(component.module)
    packed = component.parameter.endswith("in_proj_weight")
    weight = module.in_proj_weight if packed else module.weight
    if not packed and module.bias is None:
        module.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype))
    bias = module.in_proj_bias if packed else module.bias
    with torch.no_grad():
        if component.port == "in":
            bias += weight[:, part] @ means[f"{component.module} in"][part]
            weight[:, part] = 0
        else:
            bias[part] = means[component.module][part]
            weight[part] = 0
    return changed


@pytest.mark.parametrize(
    "kinds",
    [
        ["conv_filter"],
        ["linear_neuron"],
        ["qkv_neuron"],
        ["attention_head"],
        ["ffn_hidden"],
        ["residual_branch"],
        ["layer"],
    ],
    ids=lambda kinds: kinds[0],
)
def test_means_are_those_that_hooks_find(kinds: list[str], randomise: Any) -> None:
    model = randomise(Means(), 1).double().eval()
    generator = torch.Generator().manual_seed(2)
    inputs, reference = (torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) for n in (4, 11))
    targets = torch.arange(4)
    index = ablate.ComponentIndex.from_model(model, kinds)
    means = _by_hooks(model, reference)
    keep = ~np.eye(len(index), dtype=bool)
    outputs = _both(model, index, MeanAblation(reference), keep, inputs, targets)
    with torch.no_grad():
        rows = [ablate.Margin()(_with_means(model, component, means)(inputs), targets) for component in index]
    _assert_close(outputs, torch.stack(rows))
    zeroed = ablate.Engine(model, index, precision="float64").outputs(keep, inputs, targets)
    assert float((outputs - zeroed).abs().max()) > 1e-3, "a mean is not nothing"


def test_the_mean_of_what_was_used_several_times_is_over_all_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.fc(torch.relu(self.fc(x))))
            return logits

    model = Twice().double().eval()
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["fc"])
    keep = np.array([[False, True, True]])
    outputs = _both(model, index, MeanAblation(inputs), keep, inputs, torch.arange(6) % 3)
    with torch.no_grad():
        assert isinstance(model, Twice)
        first = model.fc(inputs)
        second = model.fc(torch.relu(first))
        mean = torch.cat([first, second]).mean(dim=0)
        model.fc.weight[0], model.fc.bias[0] = 0, mean[0]
        expected = ablate.Margin()(model(inputs), torch.arange(6) % 3)
    _assert_close(outputs[0], expected)


def test_means_of_packed_rows_that_see_different_inputs() -> None:
    """Two queries ask six keys: the means of their rows are over different numbers of places."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.attention(x[:, :2], x, x, need_weights=False)[0]
            return logits.mean(dim=1)

    index = ablate.ComponentIndex.from_model(Asking(), ["qkv_neuron"])
    found = mean_activations(Asking().eval(), index, [x[:2], x[2:]]).outside["attention.in_proj_weight"]
    with torch.no_grad():
        q = F.linear(x[:, :2], attention.in_proj_weight, attention.in_proj_bias)[..., :4]
        kv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)[..., 4:]
    expected = torch.cat([q.mean(dim=(0, 1)), kv.mean(dim=(0, 1))])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_used_without_the_bias_that_would_hold_the_mean(images: Tensor, labels: Tensor) -> None:
    class Bare(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.fc, self.other, self.head, self.tied = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3), tied
            if tied:
                self.other.weight = self.fc.weight

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean(dim=(2, 3))
            logits: Tensor = self.head(self.fc(x) + self.other(x) if self.tied else F.linear(x, self.fc.weight))
            return logits

    for tied, how in ((False, "without"), (True, "with another bias than")):
        model = Bare(tied)
        index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["fc"])
        engine = ablate.Engine(model, index, ablation=MeanAblation(images))
        with pytest.raises(ablate.errors.GatingError) as caught:
            engine.outputs(np.ones((1, len(index)), dtype=bool), images, labels)
        assert str(caught.value) == (
            f"The weight 'fc.weight' is used {how} the bias of module 'fc', which is to hold the mean. Ablate to zero, "
            "or leave it out with exclude=['fc']."
        )


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_means_on_odd_nets_agree_between_ways_of_gating(precision: str, odd_case: Case, some_keep: SomeKeep) -> None:
    model, index, inputs, targets, output = odd_case
    refused = {"Tied": ["one", "two"], "Shares": ["one", "two"], "Functional": ["hidden"]}.get(type(model).__name__)
    if refused is not None:
        index = ablate.ComponentIndex.from_model(model, ["conv_filter", "linear_neuron"], exclude=refused)
    keep = some_keep(index, 4)
    ablation = MeanAblation(inputs.flip(0))
    outputs = []
    for mode in ("weight", "activation"):
        engine = ablate.Engine(model, index, output, precision=precision, ablation=ablation, mode=mode)
        outputs.append(engine.outputs(keep, inputs, targets))
    _assert_close(outputs[1], outputs[0], 1e-10 if precision == "float64" else 1e-5)
    gates = torch.rand(len(inputs), len(index), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _assert_close(
        engine.example_outputs(gates, inputs, targets),
        engine.gated_outputs(gates, inputs, targets).diagonal(),
        1e-10 if precision == "float64" else 1e-5,
    )


def test_a_dataset_is_a_reference_in_batches(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    keep = ~np.eye(len(index), dtype=bool)
    data = torch.utils.data.TensorDataset(images, labels)
    outputs = [
        ablate.Engine(conv_net, index, ablation=MeanAblation(reference), batch_size=size, precision="float64").outputs(
            keep, images, labels
        )
        for reference, size in ((images, 128), (data, 2), (ablate.Examples(images, labels), 3))
    ]
    _assert_close(outputs[1], outputs[0])
    _assert_close(outputs[2], outputs[0])


def test_names_and_descriptions(images: Tensor) -> None:
    assert isinstance(get_ablation("zero"), ZeroAblation)
    assert get_ablation(scaled := ScaleAblation(2)) is scaled
    assert ZeroAblation().describe() == "zero"
    assert scaled.describe() == "scale 2.0"
    assert (
        MeanAblation(images).describe()
        == MeanAblation(images.clone()).describe()
        != MeanAblation(2 * images).describe()
    )
    with pytest.raises(ablate.UnknownNameError) as caught:
        get_ablation("zeros")
    assert str(caught.value) == "No ablation 'zeros'. Did you mean 'zero'?"
    with pytest.raises(ablate.DataError) as wrong:
        get_ablation("mean")
    assert str(wrong.value) == ("ablation is 'mean', which needs an argument: pass ablate.MeanAblation(reference).")
