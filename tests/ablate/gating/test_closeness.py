"""No mask of classes switches a check off; what rounding does is no difference; causes are named as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablate
from ablate.errors import GatingError
from ablate.gating.closeness import gap, same
from ablate.gating.layouts import ExampleLayout, find_layout, find_layout_of_pairs

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]], dtype=torch.float64)
MASKS = [float("-inf"), float("inf"), float("nan"), -1e9, torch.finfo(torch.float64).min]


@pytest.mark.parametrize("value", MASKS)
@pytest.mark.parametrize("places", [[(0, 1), (1, 1)], [(0, 1)]])
def test_a_masked_class_hides_no_difference(value: float, places: list[tuple[int, int]]) -> None:
    expected = LOGITS.clone()
    for place in places:
        expected[place] = value
    assert gap(expected.clone(), expected, 1e-5) is None
    assert same(expected.clone(), expected)
    for change in (1e-3, float("nan"), float("-inf")):
        got = expected.clone()
        got[1, 0] += change
        found = gap(got, expected, 1e-5)
        assert found is not None
        assert not same(got, expected)
        if change == 1e-3:
            assert found.difference == pytest.approx(change)
    rounded = expected * (1 - 1e-9)
    assert gap(rounded, expected, 1e-5) is None


def test_another_pattern_of_what_is_not_finite_is_a_difference() -> None:
    expected = torch.tensor([[float("-inf"), 1.0], [2.0, float("nan")]])
    for got in (expected.abs(), expected.nan_to_num(nan=float("inf")), torch.zeros(2, 2)):
        assert gap(got, expected, 1e-3) is not None


class Masked(nn.Module):
    """Masks a class, and mixes the examples of a batch, or draws random numbers."""

    def __init__(self, mask: float, fault: str) -> None:
        super().__init__()
        self.fc, self.head, self.mask, self.fault = nn.Linear(4, 5), nn.Linear(5, 4), mask, fault

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        x = x - x.mean(dim=0) if self.fault == "mixes" else F.dropout(x) if self.fault == "draws" else x
        logits: Tensor = self.head(x)
        return logits.index_fill(1, torch.tensor([3]), self.mask)


INPUTS, TARGETS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3


@pytest.mark.parametrize("mask", MASKS[:1] + MASKS[3:4])
@pytest.mark.parametrize(
    ("fault", "message"), [("mixes", "^The examples of a batch"), ("draws", "^The model is random")]
)
def test_a_masked_class_hides_no_fault_of_a_model(mask: float, fault: str, message: str, randomise: object) -> None:
    model = randomise(Masked(mask, fault), 1).eval()  # type: ignore[operator]
    index = ablate.ComponentIndex.from_model(model)
    with pytest.raises(GatingError, match=message):
        ablate.Engine(model, index).outputs(np.ones((1, len(index)), dtype=bool), INPUTS, TARGETS)


class Squeezes(nn.Module):
    """Drops the axis of a single example."""

    def __init__(self, softens: bool) -> None:
        super().__init__()
        self.conv, self.head, self.softens = nn.Conv2d(1, 8, 3), nn.Linear(8, 3), softens

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1).squeeze())
        return logits.log_softmax(dim=1) if self.softens else logits  # which fails for a single example


@pytest.mark.parametrize("softens", [False, True])
def test_a_model_that_loses_the_axis_of_a_single_example(softens: bool) -> None:
    torch.manual_seed(0)
    model = Squeezes(softens).eval()
    inputs, targets = torch.randn(5, 1, 8, 8), torch.arange(5) % 3
    index = ablate.ComponentIndex.from_model(model, ["conv_filter", "linear_neuron"])
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    expected = ablate.reference_outputs(model, index, keep, inputs, targets)
    for mode in ("weight", "activation"):
        engine = ablate.Engine(model, index, mode=mode, batch_size=2)  # the last batch is of one
        torch.testing.assert_close(engine.outputs(keep, inputs, targets), expected)
        torch.testing.assert_close(engine.outputs(keep, inputs[:1], targets[:1]), expected[:, :1])
    one_out = np.ones((len(index), len(index)), dtype=bool)
    np.fill_diagonal(one_out, False)
    singles = ablate.reference_outputs(model, index, one_out, inputs[:2], targets[:2])[:, :1]
    torch.testing.assert_close(engine.leave_one_out(inputs[:1], targets[:1]), singles)
    outputs, gradients = engine.gate_gradients(torch.ones(1, len(index)), inputs[:1], targets[:1])
    both, all_gradients = engine.gate_gradients(torch.ones(2, len(index)), inputs[:2], targets[:2])
    torch.testing.assert_close(outputs, both[:1])
    torch.testing.assert_close(gradients, all_gradients[:1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("turn", [False, True])
def test_layouts_found_of_pairs_are_those_found_of_single_examples(axis: int, turn: bool) -> None:
    a, b = torch.randn(2, 3, 3, 5, dtype=torch.float64)

    def together(one: Tensor, two: Tensor) -> Tensor:
        return torch.stack([one, two], axis + 1).flatten(axis, axis + 1) if turn else torch.cat([one, two], axis)

    both = together(a, b)
    assert find_layout(a, b, both, -1) == ExampleLayout(axis, not turn)
    assert find_layout_of_pairs(together(a, a), together(b, b), both, -1) == ExampleLayout(axis, not turn)
    assert find_layout_of_pairs(together(a, a), together(b, b), both.roll(1, axis), -1) is None


class Complex(nn.Module):
    """Turns real features by complex numbers, kept as a buffer, and one of its layers is complex."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 5, dtype=torch.complex64), nn.Linear(5, 3)
        self.register_buffer("turns", torch.exp(1j * torch.arange(5.0)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(torch.relu(self.fc(x)) * self.turns).real)
        return logits


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_complex_numbers_stay_complex_and_complex_weights_are_named(precision: str) -> None:
    torch.manual_seed(0)
    model = Complex().eval()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], exclude=["inner"])
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    expected = ablate.reference_outputs(model, index, keep, INPUTS, TARGETS)
    outputs = ablate.Engine(model, index, precision=precision).outputs(keep, INPUTS, TARGETS)
    torch.testing.assert_close(outputs.float(), expected)
    with pytest.raises(GatingError, match=r"^The weight 'inner\.weight' of module 'inner' is complex, "):
        ablate.Engine(model, ablate.ComponentIndex.from_model(model, ["linear_neuron"]))


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_weights_of_one_memory_are_one_component(precision: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    model[2].weight.data = model[0].weight.data
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], exclude=["4"])
    assert [port.parameter for port in index.ports] == ["0.weight"]
    assert "shares its weight with '0', which is listed" in set(index.left_out()["reason"])
    keep = ablate.KeepPlan(len(index), 6, 0.4).take(0, 6)
    expected = []
    for row in keep:
        with ablate.ablated(model, index.select(np.flatnonzero(~row).tolist())), torch.no_grad():
            expected.append(ablate.Margin()(model(INPUTS), TARGETS))
    tolerance = 0.05 if precision == "bfloat16" else 1e-5
    for mode in ("weight", "activation"):
        outputs = ablate.Engine(model, index, mode=mode, precision=precision).outputs(keep, INPUTS, TARGETS)
        torch.testing.assert_close(outputs.float(), torch.stack(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["expanded", "unfolded"])
def test_a_weight_that_lies_over_itself_is_refused(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    index = ablate.ComponentIndex.from_model(model)
    row = model.get_parameter("0.weight").data[:1]
    model[0].weight.data = row.expand(4, 4) if kind == "expanded" else torch.arange(7.0).as_strided((4, 4), (1, 1))
    with pytest.raises(GatingError, match=r"^The weight '0\.weight' lies over itself in memory, .*\.contiguous\(\)"):
        ablate.Engine(model, index)
    model[0].weight.data = model.get_parameter("0.weight").data.contiguous()
    ablate.Engine(model, index)
    model[0].weight.data = model.get_parameter("0.weight").data.T
    ablate.Engine(model, index)


def test_weights_that_lie_over_others_in_part_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight.data = model[0].weight.data.T
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    with pytest.raises(GatingError, match=r"^The weights '0\.weight' and '1\.weight' lie in the same memory, "):
        ablate.Engine(model, index)
    model[1].weight.data = model.get_parameter("1.weight").data.clone()
    model.register_buffer("seen", model.get_parameter("0.weight").data[1])
    with pytest.raises(GatingError, match=r"^The weights '0\.weight' and 'seen' lie in the same memory, "):
        ablate.Engine(model, index)
    others = ablate.ComponentIndex.from_model(model, ["linear_neuron"], exclude=["0"])
    ablate.Engine(model, others).outputs(np.ones((1, len(others)), dtype=bool), INPUTS, TARGETS)
