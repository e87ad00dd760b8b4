"""Gradient descent on some weights of a model, and on no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coar.editing.log import EditLog
from coar.editing.settings import wrong_types
from coar.errors import EditError

OPTIMIZERS = ("rmsprop", "sgd", "adam", "adamw")
PENALTIES = ("none", "l1", "l2")
FIRST_STEPS = ("same", "sgd")


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How to descend.

    Attributes:
      optimizer: `rmsprop` (PyTorch's defaults), `sgd`, `adam` or `adamw`.
      rate: Learning rate.
      steps: At most so many updates.
      momentum: Of sgd.
      weight_decay: As the optimizer has it. Weights that are not trained do not decay.
      decay_names: Only parameters with this in their name decay, e.g. "weight"; "": all.
      first_step: `sgd`: the first update is a plain step of size rate, whatever the optimizer; `same`: it is not.
      penalty: On the change of the trained weights: `l1` (sum of absolute values), `l2` (half the sum of squares).
      penalty_weight: Its factor.
      clip: Largest norm of the gradient; None: as it is.
      schedule: Factor of the rate at each step, from 0; None: 1.
    """

    optimizer: Literal["rmsprop", "sgd", "adam", "adamw"] = "rmsprop"
    rate: float = 2e-5
    steps: int = 100
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay_names: str = ""
    first_step: Literal["same", "sgd"] = "same"
    penalty: Literal["none", "l1", "l2"] = "none"
    penalty_weight: float = 0.0
    clip: float | None = None
    schedule: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        problems = wrong_types(self) or descent_problems(self)
        if problems:
            raise EditError(f"These settings cannot work: {'; '.join(problems)}.")


def descent_problems(settings: Any) -> list[str]:
    """Returns what is wrong with settings, in words. Mutates nothing.

    Args:
      settings: Any object with the fields of a Descent but `schedule`, of the right types.
    """
    problems = []
    for name, choices in (("optimizer", OPTIMIZERS), ("penalty", PENALTIES), ("first_step", FIRST_STEPS)):
        if getattr(settings, name) not in choices:
            problems.append(f"{name} is {getattr(settings, name)!r}, expected one of {', '.join(choices)}")
    if not (settings.rate > 0 and math.isfinite(settings.rate)):
        problems.append(f"rate is {settings.rate}, expected more than 0")
    if settings.steps < 1:
        problems.append(f"steps is {settings.steps}, expected at least 1")
    for name in ("momentum", "weight_decay", "penalty_weight"):
        value = getattr(settings, name)
        if not (value >= 0 and math.isfinite(value)):
            problems.append(f"{name} is {value}, expected 0 or more")
    if settings.momentum and settings.optimizer != "sgd":
        problems.append(f"momentum belongs to sgd, the optimizer is {settings.optimizer!r}")
    if settings.clip is not None and not settings.clip > 0:
        problems.append(f"clip is {settings.clip}, expected more than 0")
    return problems


def descend(
    model: nn.Module,
    trained: Mapping[str, Tensor | None],
    loss: Callable[[], Tensor],
    plan: Descent,
    log: EditLog,
    done: Callable[[], bool] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Changes weights of a model in place so that a loss falls; all others keep their bits.

    Args:
      model: Whose weights to train.
      trained: Parameter name -> bool mask of its shape, the weights that may move; None: all of it. The gradient is
        masked before the optimizer sees it.
      loss: Returns what to lower, on the model as it is now. Without the penalty.
      plan: How.
      log: Gets the loss of each step, and the reason for stopping.
      done: Asked before each step; True ends it. May be True at once: then nothing changes.
      after_step: Called after each step with its number, from 0: may put the weights back where they are allowed to be.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in trained}
    compared = plan.penalty != "none" and plan.penalty_weight > 0
    before = {n: w.detach().clone() for n, w in chosen.items() if compared or trained[n] is not None}
    flags = {name: weight.requires_grad for name, weight in chosen.items()}
    for weight in chosen.values():
        weight.requires_grad_(True)
    try:
        optimizer = _optimizer(chosen, plan)
        first = optimizer if plan.first_step == "same" else torch.optim.SGD(list(chosen.values()), lr=plan.rate)
        with log.progress(plan.steps, "edit") as bar:
            for step in range(plan.steps):
                if done is not None and done():
                    log.stop("converged" if step else "noop")
                    return
                _step(chosen, before, trained, loss, plan, log, optimizer if step else first, step)
                if after_step is not None:
                    after_step(step)
                bar.update(1)
        log.stop("converged" if done is not None and done() else "max_steps")
    finally:
        for name, weight in chosen.items():
            weight.requires_grad_(flags[name])
            weight.grad = None


def _step(
    chosen: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    trained: Mapping[str, Tensor | None],
    loss: Callable[[], Tensor],
    plan: Descent,
    log: EditLog,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    value = loss()
    if not value.requires_grad:
        raise EditError(f"The loss does not depend on {', '.join(map(repr, chosen))}: training cannot change it.")
    log.step(float(value.detach()))
    names = list(chosen)
    gradients = torch.autograd.grad(
        value + _penalty(chosen, before, trained, plan), [chosen[n] for n in names], allow_unused=True
    )
    for name, gradient in zip(names, gradients, strict=True):
        mask = trained[name]
        full = torch.zeros_like(chosen[name]) if gradient is None else gradient
        chosen[name].grad = full if mask is None else full * mask
    if plan.clip is not None:
        torch.nn.utils.clip_grad_norm_(list(chosen.values()), plan.clip)
    if plan.schedule is not None:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * plan.schedule(step)
    optimizer.step()
    with torch.no_grad():  # decay would move what is not trained
        for name, weight in chosen.items():
            mask = trained[name]
            if mask is not None:
                weight.copy_(torch.where(mask, weight, before[name]))


def _penalty(
    chosen: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    trained: Mapping[str, Tensor | None],
    plan: Descent,
) -> Tensor | float:
    if plan.penalty == "none" or plan.penalty_weight == 0:
        return 0.0
    changes = [weight - before[name] for name, weight in chosen.items()]
    if plan.penalty == "l1":
        return plan.penalty_weight * sum((change.abs().sum() for change in changes), start=torch.tensor(0.0))
    return plan.penalty_weight * 0.5 * sum((change.square().sum() for change in changes), start=torch.tensor(0.0))


def _optimizer(chosen: Mapping[str, nn.Parameter], plan: Descent) -> torch.optim.Optimizer:
    decaying = [weight for name, weight in chosen.items() if plan.decay_names in name]
    others = [weight for name, weight in chosen.items() if plan.decay_names not in name]
    groups = [
        {"params": weights, "weight_decay": decay}
        for weights, decay in ((decaying, plan.weight_decay), (others, 0.0))
        if weights
    ]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.rate, momentum=plan.momentum)
    kinds: dict[str, type[Any]] = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer: torch.optim.Optimizer = kinds[plan.optimizer](groups, lr=plan.rate)
    return optimizer
