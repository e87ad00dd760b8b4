"""Gradients with respect to gates: those of autograd through weights, one example at a time, and of differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.engine.gated_model import Speed

Case = tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor, str]
Slow = Callable[..., tuple[Tensor, Tensor]]


def _gates(examples: int, index: ablate.ComponentIndex, seed: int = 4) -> Tensor:
    return torch.randn(examples, len(index), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assert_close(got: Tensor, expected: Tensor, relative: float) -> None:
    assert got.shape == expected.shape
    difference = float((got.double() - expected).abs().max()) / float(expected.abs().max())
    assert difference <= relative, difference


@pytest.mark.parametrize("batch_size", [1, 2, 3, 128])
def test_equal_autograd_one_example_at_a_time(batch_size: int, odd_case: Case, slow_gradients: Slow) -> None:
    model, index, inputs, targets, output = odd_case
    gates = _gates(len(inputs), index)
    expected_outputs, expected = slow_gradients(model, index, gates, inputs, targets, output)
    assert float(expected.abs().max()) > 1e-3
    engine = ablate.Engine(model, index, output, precision="float64", batch_size=batch_size)
    outputs, gradients = engine.gate_gradients(gates, inputs, targets)
    assert outputs.dtype == gradients.dtype == torch.float64
    _assert_close(outputs, expected_outputs, 1e-10)
    _assert_close(gradients, expected, 1e-10)
    assert torch.equal(engine.example_outputs(gates, inputs, targets), outputs)


def test_equal_autograd_at_gates_of_ones_and_zeros(odd_case: Case, slow_gradients: Slow) -> None:
    model, index, inputs, targets, output = odd_case
    gates = (_gates(len(inputs), index) > -0.5).double()
    gates[0], gates[1] = 1, 0
    expected_outputs, expected = slow_gradients(model, index, gates, inputs, targets, output)
    engine = ablate.Engine(model, index, output, precision="float64", batch_size=3)
    outputs, gradients = engine.gate_gradients(gates, inputs, targets)
    _assert_close(outputs, expected_outputs, 1e-10)
    _assert_close(gradients, expected, 1e-10)


def test_equal_autograd_in_float32(odd_case: Case, slow_gradients: Slow) -> None:
    model, index, inputs, targets, output = odd_case
    gates = _gates(len(inputs), index).float()
    _, expected = slow_gradients(model, index, gates, inputs, targets, output)
    for speed in (Speed(), Speed(fold=False, channels_last=False)):
        outputs, gradients = ablate.Engine(model, index, output, batch_size=3, speed=speed).gate_gradients(
            gates, inputs, targets
        )
        assert outputs.dtype == gradients.dtype == torch.float32
        _assert_close(gradients, expected, 1e-5)


def test_equal_central_differences_of_weight_gating(odd_case: Case) -> None:
    """Component by component, and by the other way of gating: nothing is shared with what is tested."""
    model, index, inputs, targets, output = odd_case
    engine = ablate.Engine(model, index, output, precision="float64", mode="weight")
    gates = 0.3 + torch.rand(len(inputs), len(index), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    _, gradients = engine.gate_gradients(gates, inputs, targets)
    step = 1e-6 * torch.eye(len(index), dtype=torch.float64)
    for example in range(2):
        data = inputs[example : example + 1], targets[example : example + 1]
        difference = engine.gated_outputs(gates[example] + step, *data) - engine.gated_outputs(
            gates[example] - step, *data
        )
        _assert_close(gradients[example], difference[:, 0] / 2e-6, 1e-6)


def test_examples_do_not_influence_each_other(odd_case: Case) -> None:
    model, index, inputs, targets, output = odd_case
    engine = ablate.Engine(model, index, output, precision="float64")
    gates = _gates(len(inputs), index)
    outputs, gradients = engine.gate_gradients(gates, inputs, targets)
    order = [3, 0, 4, 1]
    others = engine.gate_gradients(gates[order], inputs[order], targets[order])
    _assert_close(others[0], outputs[order], 1e-12)
    _assert_close(others[1], gradients[order], 1e-12)


def test_arithmetic_of_three_weights(three_weights: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(three_weights, ["linear_neuron"], include=["hidden"])
    gates = np.array([[1, 1, 1], [0, 0.5, 2]], dtype=np.float32)
    outputs, gradients = ablate.Engine(three_weights, index).gate_gradients(gates, torch.tensor([[1.0], [2.0]]), [0, 0])
    assert outputs.tolist() == [11, 0 + 3 + 1 + 20]  # 2a·x + 3b·x + 1 + 5c·x
    assert gradients.tolist() == [[2, 3, 5], [4, 6, 10]]


def test_gates_may_be_arrays_or_tensors_of_any_floating_type(
    conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    engine = ablate.Engine(conv_net, index)
    ones = torch.ones(len(images), len(index))
    expected = engine.gate_gradients(ones, images, labels)
    forms = (
        ones.numpy(),
        ones.double(),
        ones.half(),
        ones.bfloat16(),
        ones.numpy()[::-1],
        ones.clone().requires_grad_(),
    )
    for form in forms:
        outputs, gradients = engine.gate_gradients(form, images, labels)
        assert torch.equal(outputs, expected[0])
        assert torch.equal(gradients, expected[1])
        assert not gradients.requires_grad
        assert not outputs.requires_grad


def test_work_under_no_grad_and_inference_mode(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    ones = torch.ones(len(images), len(index))
    expected = ablate.Engine(conv_net, index).gate_gradients(ones, images, labels)
    with torch.no_grad():
        inside = ablate.Engine(conv_net, index).gate_gradients(ones, images, labels)
    assert torch.equal(inside[1], expected[1])


def test_a_frozen_model_has_gate_gradients(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    ones = torch.ones(len(images), len(index))
    expected = ablate.Engine(conv_net, index).gate_gradients(ones, images, labels)
    frozen = ablate.Engine(conv_net.requires_grad_(False), index).gate_gradients(ones, images, labels)
    assert torch.equal(frozen[1], expected[1])


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.idle, self.head = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)  # its result is dropped
        logits: Tensor = self.head(self.body(x))
        return logits


def test_a_component_that_nothing_reads_has_gradient_zero() -> None:
    index = ablate.ComponentIndex.from_model(Idle(), ["linear_neuron"])
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    _, gradients = ablate.Engine(Idle(), index).gate_gradients(np.ones((4, len(index))), inputs, [0, 1, 2, 0])
    idle = [c.id for c in index if c.module == "idle"]
    assert not gradients[:, idle].any()


def test_gates_that_reach_no_output_have_gradient_zero() -> None:
    only = ablate.ComponentIndex.from_model(Idle(), ["linear_neuron"], include=["idle"])
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    outputs, gradients = ablate.Engine(Idle(), only).gate_gradients(np.ones((4, 2)), inputs, [0, 1, 2, 0])
    assert outputs.shape == (4,)
    assert not gradients.any()


def test_within_inference_mode(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_input"])
    gates = torch.rand(7, len(index), generator=torch.Generator().manual_seed(0))
    keep = ablate.KeepPlan(len(index), 3, 0.3).take(0, 3)
    outside = ablate.Engine(conv_net, index)
    expected = outside.gate_gradients(gates, images, labels), outside.outputs(keep, images, labels)
    with torch.inference_mode():
        engine = ablate.Engine(conv_net, index)
        inside = engine.gate_gradients(gates.clone(), images.clone(), labels.clone())
        assert torch.equal(engine.outputs(keep, images.clone(), labels), expected[1])
    for got, wanted in zip(inside, expected[0], strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(engine.gate_gradients(gates, images, labels)[1], expected[0][1])


class _PartlyFloat32(nn.Module):
    """Computes some of its way in float32, as language models' norms do, and looks a constant up without autograd."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.first, self.last, self.cut = nn.Linear(6, 40), nn.Linear(40, 3), cut

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        with torch.no_grad():
            turn = torch.arange(40, dtype=torch.float32).cos() + 1.5
        h = torch.tanh(self.first(x)).float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = h * turn
        if self.cut:
            h = torch.cat([h[:, :20].detach(), h[:, 20:]], dim=1)
        return self.last(h.to(x.dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(3))
def test_float32_in_the_middle_of_a_model_is_not_taken_for_a_cut(seed: int) -> None:
    """Differences of float64 in steps of 1e-6 would tell of rounding only."""
    torch.manual_seed(seed)
    inputs, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    model = _PartlyFloat32(cut=False).eval()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["first"])
    _, gradients = ablate.Engine(model, index).gate_gradients(torch.ones(4, 40), inputs, targets)
    assert float(gradients.abs().min(dim=0).values.max()) > 0
    with pytest.raises(ablate.NoGradientError, match="'first'"):
        ablate.Engine(_PartlyFloat32(cut=True).eval(), index).gate_gradients(torch.ones(4, 40), inputs, targets)
