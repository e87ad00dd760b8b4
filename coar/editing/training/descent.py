"""Gradient descent on some weights of a model, and on no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coar.editing.log import EditLog
from coar.editing.running import is_out_of_memory
from coar.editing.settings import Count, FromZero, Positive, problems_of
from coar.errors import EditError

Loss = Callable[[], Tensor | Iterable[Tensor]]

OptimizerName = Literal["rmsprop", "sgd", "adam", "adamw"]
PenaltyName = Literal["none", "l1", "l2"]
FirstStep = Literal["same", "sgd"]
Clip = Annotated[float, Field(gt=0)]  # infinite: nothing is clipped


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

    optimizer: OptimizerName = "rmsprop"
    rate: Positive = 2e-5
    steps: Count = 100
    momentum: FromZero = 0.0
    weight_decay: FromZero = 0.0
    decay_names: str = ""
    first_step: FirstStep = "same"
    penalty: PenaltyName = "none"
    penalty_weight: FromZero = 0.0
    clip: Clip | None = None
    schedule: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        problems = problems_of(self, lambda: descent_problems(self))
        if problems:
            raise EditError(f"These settings cannot work: {'; '.join(problems)}.")


def descent_problems(settings: Any) -> list[str]:
    """Returns what is wrong between the settings of a descent, in words. Mutates nothing.

    Args:
      settings: Any object with the fields `optimizer` and `momentum`.
    """
    if settings.momentum and settings.optimizer != "sgd":
        return [f"momentum belongs to sgd, the optimizer is {settings.optimizer!r}"]
    return []


def descend(
    model: nn.Module,
    trained: Mapping[str, Tensor | None],
    loss: Loss,
    plan: Descent,
    log: EditLog,
    done: Callable[[], bool] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Changes weights of a model in place so that a loss falls; all others keep their bits.

    So do parameters that get no gradient at all: no decay moves them, and the log names them (`without_gradient`).

    Args:
      model: Whose weights to train.
      trained: Parameter name -> bool mask of its shape, the weights that may move; None: all of it. The gradient is
        masked before the optimizer sees it.
      loss: Returns what to lower, on the model as it is now, without the penalty; or its terms one by one: each is gone
        back through before the next is made, so that memory is that of one.
      plan: How.
      log: Gets the loss of each step, and the reason for stopping.
      done: Asked before each step; True ends it. May be True at once: then nothing changes.
      after_step: Called after each step with its number, from 0: may put the weights back where they are allowed to be.

    Raises:
      EditError: A loss that is not finite, or that none of the weights has a gradient of.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in trained}
    compared = plan.penalty != "none" and plan.penalty_weight > 0
    before = {n: w.detach().clone() for n, w in chosen.items() if compared or trained[n] is not None}
    flags = {name: weight.requires_grad for name, weight in chosen.items()}
    for weight in chosen.values():
        weight.requires_grad_(True)
    reached: set[str] = set()
    try:
        optimizer = _optimizer(chosen, plan)
        first = optimizer if plan.first_step == "same" else torch.optim.SGD(list(chosen.values()), lr=plan.rate)
        with log.progress(plan.steps, "edit") as bar:
            for step in range(plan.steps):
                if done is not None and done():
                    log.stop("converged" if step else "noop")
                    return
                reached |= _step(chosen, before, trained, loss, plan, log, optimizer if step else first, step)
                if after_step is not None:
                    after_step(step)
                bar.update(1)
        log.stop("converged" if done is not None and done() else "max_steps")
    finally:
        if log.losses and (left := [name for name in chosen if name not in reached]):
            log.entries["without_gradient"] = left
        for name, weight in chosen.items():
            weight.requires_grad_(flags[name])
            weight.grad = None


def value_of(loss: Loss) -> float:
    """Returns a loss as a number, term by term, without gradient. Mutates nothing."""
    with torch.no_grad():
        terms = loss()
        return sum(float(term) for term in ((terms,) if isinstance(terms, Tensor) else terms))


def _step(
    chosen: Mapping[str, nn.Parameter],
    before: Mapping[str, Tensor],
    trained: Mapping[str, Tensor | None],
    loss: Loss,
    plan: Descent,
    log: EditLog,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> set[str]:
    """Makes one update; returns the names of the parameters that have a gradient. The others are left alone."""
    log.step(_back(chosen, loss))
    reached = {name: weight for name, weight in chosen.items() if weight.grad is not None}
    if not reached:
        raise _unreached(chosen)
    _add_penalty(reached, before, plan)
    for name, weight in reached.items():
        mask = trained[name]
        if mask is not None:
            weight.grad = _gradient(weight) * mask
    if plan.clip is not None:
        torch.nn.utils.clip_grad_norm_(list(reached.values()), plan.clip)
    if plan.schedule is not None:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * plan.schedule(step)
    optimizer.step()
    with torch.no_grad():  # decay would move what is not trained
        for name, weight in reached.items():
            mask = trained[name]
            if mask is not None:
                weight.copy_(torch.where(mask, weight, before[name]))
    return set(reached)


def _back(chosen: Mapping[str, nn.Parameter], loss: Loss) -> float:
    """Returns the loss; its gradient is in the parameters that it depends on, and None in the others."""
    for weight in chosen.values():
        weight.grad = None
    terms = loss()
    total = 0.0
    for term in (terms,) if isinstance(terms, Tensor) else terms:
        total += float(term.detach())
        if term.requires_grad:
            _backward(term)
    return total


def _backward(term: Tensor) -> None:
    try:
        torch.autograd.backward(term)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
        raise EditError(
            f"The gradient of the loss cannot be computed: {reason}. The model's forward changes what the gradient "
            "needs, or runs a function without a backward: let it work on copies, or select layers behind that."
        ) from error


def _gradient(weight: nn.Parameter) -> Tensor:
    """Returns the gradient that a parameter has; zero where it has none."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _unreached(chosen: Mapping[str, nn.Parameter]) -> EditError:
    names = ", ".join(map(repr, list(chosen)[:5])) + (" ..." if len(chosen) > 5 else "")
    return EditError(
        f"The loss does not depend on {names}: no gradient gets there, so training cannot change it. The model runs "
        "these layers under torch.no_grad(), detaches what they give, or does not use them. Let gradients through, or "
        "select layers behind that."
    )


def _add_penalty(reached: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], plan: Descent) -> None:
    """Adds the gradient of the penalty to those of the loss."""
    if plan.penalty == "none" or plan.penalty_weight == 0:
        return
    for name, weight in reached.items():
        change = weight.detach() - before[name]
        slope = change.sign() if plan.penalty == "l1" else change
        weight.grad = _gradient(weight) + plan.penalty_weight * slope


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
