"""Descent: closed forms on a quadratic, optimizers step by step, and what is not trained keeps its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coar.editing.log import EditLog
from coar.editing.training.descent import Descent, descend
from coar.errors import EditError


@pytest.fixture
def layer() -> nn.Linear:
    """A linear layer (3 -> 4) in float64, no bias."""
    net = nn.Linear(3, 4, bias=False).double()
    net.requires_grad_(False)
    return net


@pytest.fixture
def goal() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _quadratic(layer: nn.Module, goal: Tensor) -> Callable[[], Tensor]:
    return lambda: 0.5 * (layer.get_parameter("weight") - goal).square().sum()


def _descend(layer: nn.Module, loss: Callable[[], Tensor], mask: Tensor | None = None, **plan: Any) -> EditLog:
    log = EditLog()
    descend(layer, {"weight": mask}, loss, Descent(**plan), log)
    return log


@pytest.mark.parametrize("c", [0.0, 0.1, 1.0, 10.0])
def test_l2_ends_between_the_goal_and_the_start(layer: nn.Linear, goal: Tensor, c: float) -> None:
    start = layer.weight.clone()
    loss = _quadratic(layer, goal)
    _descend(layer, loss, optimizer="sgd", rate=0.08, steps=500, penalty="l2", penalty_weight=c)
    torch.testing.assert_close(layer.weight.detach(), (goal + c * start) / (1 + c), rtol=0, atol=1e-9)


@pytest.mark.parametrize("c", [0.1, 0.5, 100.0])
def test_l1_ends_at_the_soft_threshold(layer: nn.Linear, goal: Tensor, c: float) -> None:
    start = layer.weight.clone()
    rate = 5e-3 / max(1.0, c)
    _descend(layer, _quadratic(layer, goal), optimizer="sgd", rate=rate, steps=3000, penalty="l1", penalty_weight=c)
    moved, change = layer.weight.detach() - start, goal - start
    kept = change.abs() <= c
    assert kept.any()
    # a subgradient never stays at zero change: it jumps around it, by a step at most
    assert float(moved[kept].abs().max()) <= 2 * rate * c
    torch.testing.assert_close(moved[~kept], (change.sign() * (change.abs() - c))[~kept], rtol=0, atol=1e-5)


def test_a_huge_penalty_lets_nothing_move(layer: nn.Linear, goal: Tensor) -> None:
    start = layer.weight.clone()
    moved = []
    for c in (1.0, 1e2, 1e4, 1e6):
        with torch.no_grad():
            layer.weight.copy_(start)
        plan: dict[str, Any] = {"optimizer": "sgd", "rate": 0.5 / (1 + c), "steps": 60}
        _descend(layer, _quadratic(layer, goal), **plan, penalty="l2", penalty_weight=c)
        moved.append(float((layer.weight - start).norm()))
        assert moved[-1] == pytest.approx(float((goal - start).norm()) / (1 + c), rel=1e-9)
    assert moved[-1] < 1e-5


def test_the_first_step_of_rmsprop_is_ten_rates_long(layer: nn.Linear, goal: Tensor) -> None:
    start = layer.weight.clone()
    _descend(layer, _quadratic(layer, goal), optimizer="rmsprop", rate=2e-5, steps=1)
    torch.testing.assert_close(layer.weight - start, 2e-4 * (goal - start).sign(), rtol=1e-5, atol=0)


def test_the_first_step_can_be_a_plain_one(layer: nn.Linear, goal: Tensor) -> None:
    """As in Yang et al.'s code: then RMSprop begins afresh."""
    start = layer.weight.clone()
    _descend(layer, _quadratic(layer, goal), rate=1e-3, steps=1, first_step="sgd")
    one = layer.weight.clone()
    torch.testing.assert_close(one, start + 1e-3 * (goal - start), rtol=0, atol=1e-15)
    _descend(layer, _quadratic(layer, goal), rate=1e-3, steps=1)
    two = layer.weight.clone()
    with torch.no_grad():
        layer.weight.copy_(start)
    _descend(layer, _quadratic(layer, goal), rate=1e-3, steps=2, first_step="sgd")
    assert torch.equal(layer.weight, two)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "rmsprop": {"optimizer": "rmsprop", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "clip": 1e6},
    "l2": {"optimizer": "sgd", "momentum": 0.9, "penalty": "l2", "penalty_weight": 0.3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_trained_keeps_its_bits(layer: nn.Linear, goal: Tensor, name: str) -> None:
    """Momentum and decay are masked, too; and what is trained moves as if all of it was."""
    start = layer.weight.clone()
    with torch.no_grad():
        start[0, 0], start[1, 1] = -0.0, float("inf")
        layer.weight.copy_(start)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[2:] = True
    part = lambda: 0.5 * (layer.weight - goal)[2:].square().sum()  # noqa: E731
    _descend(layer, part, mask, rate=1e-2, steps=20, **OPTIMIZERS[name])
    masked = layer.weight.clone()
    assert torch.equal(masked[:2].view(torch.int64), start[:2].view(torch.int64))
    with torch.no_grad():
        layer.weight.copy_(torch.where(start.isinf(), 0.0, start))
    _descend(layer, _quadratic(layer, goal), rate=1e-2, steps=20, **OPTIMIZERS[name])
    assert torch.equal(masked[2:], layer.weight[2:])
    assert not torch.equal(masked[2:], start[2:])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mask_of_ones_is_no_mask(layer: nn.Linear, goal: Tensor, name: str) -> None:
    start = layer.weight.clone()
    ends = []
    for mask in (None, torch.ones(4, 3, dtype=torch.bool)):
        with torch.no_grad():
            layer.weight.copy_(start)
        _descend(layer, _quadratic(layer, goal), mask, rate=1e-2, steps=7, **OPTIMIZERS[name])
        ends.append(layer.weight.clone())
    assert torch.equal(*ends)


def test_decay_by_name() -> None:
    net = nn.Linear(2, 2).double()
    net.requires_grad_(False)
    start = {name: value.clone() for name, value in net.named_parameters()}
    loss = lambda: 0.0 * (net.weight.sum() + net.bias.sum())  # noqa: E731
    plan = Descent(optimizer="sgd", rate=0.5, steps=1, weight_decay=0.1, decay_names="weight")
    descend(net, {"weight": None, "bias": None}, loss, plan, EditLog())
    torch.testing.assert_close(net.weight.detach(), 0.95 * start["weight"], rtol=0, atol=1e-15)
    assert torch.equal(net.bias, start["bias"])


def test_the_rate_follows_the_schedule(layer: nn.Linear) -> None:
    seen = []

    def loss() -> Tensor:
        seen.append(float(layer.weight.detach()[0, 0]))
        return layer.weight.sum()

    factors = [0.25, 1.0, 0.5, 0.0]
    _descend(layer, loss, optimizer="sgd", rate=0.1, steps=4, schedule=lambda step: factors[step])
    steps = [a - b for a, b in zip(seen, [*seen[1:], float(layer.weight.detach()[0, 0])], strict=True)]
    assert steps == pytest.approx([0.025, 0.1, 0.05, 0.0], abs=1e-12)


def test_clipping_bounds_the_step(layer: nn.Linear, goal: Tensor) -> None:
    start = layer.weight.clone()
    _descend(layer, _quadratic(layer, goal), optimizer="sgd", rate=0.1, steps=1, clip=0.5)
    assert float((layer.weight - start).norm()) == pytest.approx(0.05, rel=1e-5)


def test_done_is_asked_before_each_step(layer: nn.Linear, goal: Tensor) -> None:
    start = layer.weight.clone()
    for stop_at, reason, steps in ((0, "noop", 0), (3, "converged", 3), (5, "converged", 5), (9, "max_steps", 5)):
        asked: list[int] = []

        def done(asked: list[int] = asked, stop_at: int = stop_at) -> bool:
            asked.append(len(asked))
            return asked[-1] == stop_at

        log = EditLog()
        with torch.no_grad():
            layer.weight.copy_(start)
        descend(layer, {"weight": None}, _quadratic(layer, goal), Descent(rate=1e-2, steps=5), log, done)
        assert (log.reason, len(log.losses)) == (reason, steps)
        assert torch.equal(layer.weight, start) == (steps == 0)
        assert asked == list(range(min(stop_at, 5) + 1))


def test_a_loss_that_is_no_number_stops_it(layer: nn.Linear) -> None:
    with pytest.raises(EditError) as refused:
        _descend(layer, lambda: layer.weight.sum() * float("inf"), rate=1e-2, steps=5)
    assert str(refused.value) in (
        f"The loss at step 0 is {sign}inf: the training diverged. Lower the rate, or look for inputs that the model "
        "does not take."
        for sign in ("", "-")
    )
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


def test_a_loss_that_does_not_depend_on_the_weights(layer: nn.Linear) -> None:
    with pytest.raises(EditError) as refused:
        _descend(layer, lambda: torch.tensor(1.0), rate=1e-2, steps=5)
    assert str(refused.value) == (
        "The loss does not depend on 'weight': no gradient gets there, so training cannot change it. The model runs "
        "these layers under torch.no_grad(), detaches what they give, or does not use them. Let gradients through, or "
        "select layers behind that."
    )


def test_settings_that_cannot_work_are_all_named() -> None:
    wrong: dict[str, Any] = {
        "optimizer": "adagrad",
        "penalty": "l3",
        "first_step": "adam",
        "rate": float("inf"),
        "steps": 0,
        "momentum": 0.9,
        "weight_decay": -1.0,
        "penalty_weight": float("nan"),
        "clip": 0.0,
    }
    with pytest.raises(EditError) as refused:
        Descent(**wrong)
    assert str(refused.value) == (
        "These settings cannot work: optimizer is 'adagrad', expected one of rmsprop, sgd, adam, adamw; rate is "
        "inf, expected a number above 0; steps is 0, expected an integer from 1; weight_decay is -1.0, expected a "
        "number from 0; first_step is 'adam', expected one of same, sgd; penalty is 'l3', expected one of none, l1, "
        "l2; penalty_weight is nan, expected a number from 0; clip is 0.0, expected a number above 0 or None; "
        "momentum belongs to sgd, the optimizer is 'adagrad'."
    )
