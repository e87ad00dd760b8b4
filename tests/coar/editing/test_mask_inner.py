"""The inner problem: closed forms, the first-order gradient, and samples side by side."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import ComponentIndex
from coar.editing.masks.free_masks import free_masks, optimizer_of
from coar.editing.masks.inner import InnerLoop, distillation
from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditError

OUTPUTS, INPUTS = 4, 3


def _linear() -> nn.Linear:
    return nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64).eval().requires_grad_(False)


def _loop(model: nn.Module, kinds: list[str], **settings: Any) -> tuple[InnerLoop, MaskLayout]:
    layout = MaskLayout(ComponentIndex.from_model(model, kinds).everything())
    return InnerLoop(model, layout, MetaSettings.preset("code", **settings)), layout


def _samples(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, INPUTS, dtype=torch.float64), torch.randn(count, OUTPUTS, dtype=torch.float64)


def test_the_logit_gradient_of_the_tempered_divergence() -> None:
    teacher, student = torch.randn(2, 5, 7, dtype=torch.float64)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(distillation(teacher, student, 5.0).sum(), student)
    p, q = (F.softmax(logits / 5.0, dim=1) for logits in (teacher, student))
    torch.testing.assert_close(gradient, 5.0 * (q - p))


def test_at_temperature_1_it_is_the_plain_divergence() -> None:
    teacher, student = torch.randn(2, 5, 7, dtype=torch.float64)
    plain = F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(distillation(teacher, student, 1.0), plain)


@pytest.mark.parametrize("kinds", [["linear_neuron"], ["linear_input"]])
def test_one_step_of_a_linear_model_in_closed_form(kinds: list[str]) -> None:
    # phi(1) = phi(0) - alpha * m * g, with g = temperature * (q - p) x' for logits W x
    model = _linear()
    inner, layout = _loop(model, kinds, inner_steps=1, inner_rate=0.3, temperature=2.0)
    inputs, teacher = _samples(2)
    masks = torch.rand(2, layout.bits, dtype=torch.float64)
    losses = inner.losses(masks, inputs, teacher)
    for i in range(2):
        p = F.softmax(teacher[i] / 2, 0)
        q = F.softmax(model(inputs[i]) / 2, 0)
        gradient = 2.0 * torch.outer(q - p, inputs[i])
        mask = masks[i][:, None] if kinds == ["linear_neuron"] else masks[i][None]
        tuned = model.weight - 0.3 * mask * gradient
        expected = distillation(teacher[i], inputs[i] @ tuned.T + model.bias, 2.0)
        torch.testing.assert_close(losses[i], expected)


def _numerical(inner: InnerLoop, masks: Tensor, inputs: Tensor, teacher: Tensor) -> Tensor:
    """The true gradient, by central differences."""
    found, step = torch.zeros_like(masks), 1e-5
    for place in range(masks.shape[1]):
        up, down = masks.clone(), masks.clone()
        up[:, place] += step
        down[:, place] -= step
        change = inner.losses(up, inputs, teacher) - inner.losses(down, inputs, teacher)
        found[:, place] = change.detach() / (2 * step)
    return found


@pytest.mark.parametrize(("steps", "exact"), [(1, True), (3, False)])
def test_the_first_order_gradient_is_exact_for_one_step(steps: int, exact: bool) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)).double().eval().requires_grad_(False)
    inner, layout = _loop(model, ["linear_neuron"], inner_steps=steps, inner_rate=0.5, sparsity=0.0)
    inputs, teacher = _samples(3)
    masks = torch.rand(3, layout.bits, dtype=torch.float64)
    _, gradient = inner.objective(masks, inputs, teacher)
    difference = (gradient - _numerical(inner, masks, inputs, teacher)).abs().max()
    assert (float(difference) < 1e-7) == exact


def test_the_gradient_is_delta_times_the_gradient_of_phi() -> None:
    # d loss / d m_r = sum_j delta(T)_rj * [gradient by phi at phi(T)]_rj
    model = _linear()
    steps, rate, temperature = 4, 0.4, 1.0
    inner, layout = _loop(
        model, ["linear_neuron"], inner_steps=steps, inner_rate=rate, temperature=temperature, sparsity=0.0
    )
    inputs, teacher = _samples(1)
    masks = torch.rand(1, layout.bits, dtype=torch.float64)

    def gradient_at(weight: Tensor) -> Tensor:
        q = F.softmax(inputs[0] @ weight.T + model.bias, 0)
        return torch.outer(q - F.softmax(teacher[0], 0), inputs[0])

    delta = torch.zeros_like(model.weight)
    for _ in range(steps):
        delta = delta - rate * gradient_at(model.weight + masks[0][:, None] * delta)
    expected = (delta * gradient_at(model.weight + masks[0][:, None] * delta)).sum(dim=1)
    _, gradient = inner.objective(masks, inputs, teacher)
    torch.testing.assert_close(gradient[0], expected)


def test_a_mask_of_zeros_changes_nothing_and_is_no_division_by_zero() -> None:
    model = _linear()
    inner, layout = _loop(model, ["linear_neuron"])
    inputs, teacher = _samples(2)
    masks = torch.sigmoid(torch.full((2, layout.bits), -1000.0, dtype=torch.float64))
    assert not masks.any()
    losses, gradient = inner.objective(masks, inputs, teacher)
    assert torch.equal(losses, distillation(teacher, model(inputs), 5.0))
    assert torch.isfinite(gradient).all()


def test_sparsity_is_normalised_as_said() -> None:
    inputs, teacher = _samples(2)
    masks = torch.rand(2, OUTPUTS, dtype=torch.float64)
    model = _linear()
    gradients = {
        norm: _loop(model, ["linear_neuron"], sparsity=3.0, sparsity_norm=norm)[0].objective(masks, inputs, teacher)[1]
        for norm in ("mean", "sum")
    }
    torch.testing.assert_close(gradients["sum"] - gradients["mean"], torch.full_like(masks, 3.0 - 3.0 / 8))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_samples_side_by_side_are_those_one_by_one(name: str) -> None:
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=5, **size).eval().requires_grad_(False)
    index = ComponentIndex.from_model(model, ["ffn_in", "ffn_out"] if name == "test_vit" else ["conv_filter"])
    layout = MaskLayout(index.everything().sample(60, 0))
    inputs, teacher = torch.randn(3, 3, 32, 32), torch.randn(3, 5)
    masks = torch.rand(3, layout.bits)
    found = [
        InnerLoop(model, layout, MetaSettings.preset("code", at_once=at_once, inner_steps=2, inner_rate=0.1)).objective(
            masks, inputs, teacher
        )
        for at_once in (1, 2, 8)
    ]
    for losses, gradient in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_each_sample_sees_its_own_mask_only() -> None:
    model = _linear()
    inner, layout = _loop(model, ["linear_neuron"])
    inputs, teacher = _samples(4)
    masks, order = torch.rand(4, layout.bits, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    losses, gradient = inner.objective(masks, inputs, teacher)
    again, gradient_again = inner.objective(masks[order], inputs[order], teacher[order])
    torch.testing.assert_close(again, losses[order])
    torch.testing.assert_close(gradient_again, gradient[order])


def test_a_divergence_that_is_not_finite_is_named() -> None:
    model = _linear()
    inner, layout = _loop(model, ["linear_neuron"], inner_rate=1e300)
    inputs, teacher = _samples(2)
    message = (
        "The divergence of sample 0 of a minibatch is not finite. Lower inner_rate (now 1e+300), or check the images."
    )
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        inner.objective(torch.ones(2, layout.bits, dtype=torch.float64), inputs * 1e100, teacher)


@pytest.mark.parametrize(("optimizer", "movement"), [("rmsprop", 5.06), ("adam", 1.00)])
def test_ten_steps_under_a_constant_gradient(optimizer: Any, movement: float) -> None:
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    steps = optimizer_of(z, MetaSettings.preset("code", free_optimizer=optimizer))
    for _ in range(10):
        z.grad = torch.tensor([1e-3, 1.0, -20.0], dtype=torch.float64)
        steps.step()
    expected = torch.tensor([-movement, -movement, movement], dtype=torch.float64)
    torch.testing.assert_close(z.detach(), expected, rtol=0, atol=0.006)


def test_the_first_step_of_rmsprop_is_ten_times_its_rate() -> None:
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.tensor([3.0, -0.01, 1e3, 0.0], dtype=torch.float64)
    torch.optim.RMSprop([weight], lr=2e-5).step()
    expected = torch.tensor([-2e-4, 2e-4, -2e-4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=0)
    assert math.isclose(2e-5 / math.sqrt(1 - 0.99), 2e-4)


def test_free_masks_find_the_weights_that_matter() -> None:
    """Of four outputs only the first differs between teacher and model: tuning the others' rows does not pay."""
    model = _linear()
    settings = MetaSettings.preset(
        "code", inner_steps=1, inner_rate=0.05, temperature=1.0, sparsity=0.05, free_steps=60, free_rate=0.05
    )
    layout = MaskLayout(ComponentIndex.from_model(model, ["linear_neuron"]).everything())
    inputs = torch.ones(2, INPUTS, dtype=torch.float64)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, -9.0, -9.0, 0.0]))
        model.weight.zero_()
    teacher = torch.tensor([[4.0, -9.0, -9.0, 0.0]] * 2, dtype=torch.float64)
    masks, labels, losses = free_masks(
        InnerLoop(model, layout, settings), inputs, teacher, layout.bits, settings, torch.Generator().manual_seed(0)
    )
    assert masks.shape == labels.shape == (2, OUTPUTS)
    assert losses.shape == (2,)
    assert (masks[:, [0, 3]] > 0.9).all()
    assert (masks[:, [1, 2]] < 0.1).all()
    logit = torch.logit(labels.double()) / settings.label_slope
    torch.testing.assert_close(torch.sigmoid(settings.free_slope * logit), masks.double(), rtol=0, atol=1e-4)
