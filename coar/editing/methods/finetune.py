"""Fine-tuning on labels: lower the cross-entropy of the wished labels, by the weights of a selection and no other.

Sources: Yang et al., Learning where to edit vision Transformers (arXiv 2411.01948), Section 5.1, and its code, ft.py;
Santurkar et al., Editing a classifier by rewriting its prediction rules (arXiv 2112.01008), Appendix A.4.2; Brown et
al., Robustness of edited neural networks (2023), Appendices B.2 and D.3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ablate import Selection
from coar.editing.abstract import Editor, Found
from coar.editing.log import EditLog
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.editing.settings import Count, CountFromZero, FromZero, Positive
from coar.editing.training.descent import (
    Clip,
    Descent,
    FirstStep,
    OptimizerName,
    PenaltyName,
    descend,
    descent_problems,
)
from coar.editing.training.early_stopping import BestWeights, validation_of
from coar.editing.training.labels import LabelLoss, contradiction
from coar.editing.training.schedules import warm_up_cosine
from coar.editing.where import scopes
from coar.editing.where.defaults import last_feed_forward_blocks, last_layer
from coar.errors import EditError

ScopeName = Literal["selection", "local", "global", "encoder"]
ScheduleName = Literal["constant", "warm-up-cosine"]

# Santurkar et al., A.4.2: (rate, steps). Their Table 2 has 400 steps, which is not among these.
SANTURKAR_GRID = ((1e-2, 500), (1e-3, 500), (1e-4, 500), (1e-5, 800), (1e-6, 800))
# Yang et al., edit_natural.py: factors of the penalty
YANG_PENALTIES = (0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1)
UNMOVED = 1e-3  # of the largest change: what counts as no change in the log


@dataclass(frozen=True, kw_only=True)
class FineTuning(Editor):
    """Changes weights by gradient descent until the inputs get their labels. The defaults are Yang et al.'s.

    The model stays in eval mode: batch norm statistics never change, dropout is off. Inputs whose labels are predicted
    already need no edit: it returns one without change, and the log says `noop`.

    Cost: a forward and a backward pass over the inputs of a step; with `stop_loss` also a forward pass over all inputs,
    unless they are in one step and at most `at_once`. Memory: beside the model three times the trained weights
    (gradient, optimizer state, copy), and the activations of `at_once` inputs, or of one batch if it is smaller.

    Parameters that get no gradient, e.g. of a backbone that the model runs under torch.no_grad(), keep their bits; the
    log names them.

    Decisions where papers and code differ: every step is RMSprop's; Yang's code takes a plain gradient step first,
    with `first_step="sgd"`. Steps and rate of `santurkar` come from its grid. `brown` leaves the batch open: all inputs
    at once. The l1 penalty is a subgradient, as published: it makes changes small, not exactly zero; the log's
    `unmoved_share` counts those below a thousandth of the largest.

    Attributes:
      scope: `selection`: the weights of the selected components, exactly. `local`: the whole weight of the one layer
        that the selection lies in, no bias. `global`: every parameter that a forward pass uses from the first selected
        layer to the logits, with biases and the affine part of normalisation. `encoder`: every parameter but those of
        the layer that gives the logits.
      optimizer: `rmsprop`, `sgd`, `adam` or `adamw`, otherwise with PyTorch's defaults.
      rate: Learning rate.
      steps: At most so many updates.
      epochs: Looks at each input, instead of `steps`; None: see there.
      batch_size: Inputs per step, in a random order by `seed`; None: all.
      momentum: Of sgd.
      weight_decay: Decay as the optimizer has it, of trained weights only.
      decay_names: Only parameters with this in their name decay, e.g. "weight"; "": all.
      penalty: On the change: `none`, `l1` (sum of absolute values) or `l2` (half the sum of squares). `stop_loss` does
        not count it.
      penalty_weight: Its factor. So large that no label is learnt: `max_steps`, not an error.
      clip: Largest norm of the gradient; None: as it is.
      schedule: Of the rate: `constant`, or `warm-up-cosine`.
      warm_up: Steps until the full rate, with `warm-up-cosine`.
      first_step: `sgd`: as in Yang's code, the first update is a plain gradient step; `same`: it is not.
      stop_loss: It ends, before an update, when every label is predicted and the cross-entropy is this or less; None:
        not before the last step.
      one_label: Refuse labels that are not all the same.
      early_stopping: Stop and keep weights by accuracy on the request's first validation set: needs `validation`.
      patience: For it: so many epochs without a better score.
      at_once: Inputs run at a time, however many a step or a check needs: changes rounding only.
    """

    name: ClassVar[str] = "finetune"
    title: ClassVar[str] = "Fine-tuning on labels"
    source: ClassVar[str] = "Yang et al. (arXiv 2411.01948), Section 5.1; Santurkar et al. (arXiv 2112.01008), A.4.2"
    needs: ClassVar[tuple[str, ...]] = ("labels",)
    quick: ClassVar[Mapping[str, Any]] = {"rate": 1e-3, "steps": 20}

    scope: ScopeName = "selection"
    optimizer: OptimizerName = "rmsprop"
    rate: Positive = 2e-5
    steps: Count = 100
    epochs: Count | None = None
    batch_size: Count | None = None
    momentum: FromZero = 0.0
    weight_decay: FromZero = 0.0
    decay_names: str = ""
    penalty: PenaltyName = "none"
    penalty_weight: FromZero = 0.0
    clip: Clip | None = None
    schedule: ScheduleName = "constant"
    warm_up: CountFromZero = 0
    first_step: FirstStep = "same"
    stop_loss: FromZero | None = 0.01
    one_label: bool = False
    early_stopping: bool = False
    patience: Count = 50
    at_once: Count = BATCH

    @property
    def room(self) -> tuple[str, int]:
        """The setting that says how many examples run at a time, and how many do."""
        if self.batch_size is not None and self.batch_size < self.at_once:
            return "batch_size", self.batch_size
        return "at_once", self.at_once

    def _problems(self) -> list[str]:
        problems = descent_problems(self)
        if self.warm_up and self.schedule == "constant":
            problems.append("warm_up belongs to schedule='warm-up-cosine', the schedule is 'constant'")
        if self.penalty == "none" and self.penalty_weight:
            problems.append(f"penalty_weight is {self.penalty_weight} without a penalty: pass penalty='l1' or 'l2'")
        return problems

    @classmethod
    def santurkar(cls, scope: ScopeName = "local", rate: float = 1e-4, steps: int = 500, **settings: Any) -> FineTuning:
        """Returns the baseline of Santurkar et al.: plain gradient descent, all inputs of one label.

        Args:
          scope: `local` or `global`.
          rate, steps: From `SANTURKAR_GRID`.
          settings: Others than the paper's.
        """
        paper = {"optimizer": "sgd", "stop_loss": None, "one_label": True}
        return cls(**{**paper, "scope": scope, "rate": rate, "steps": steps, **settings})

    @classmethod
    def brown(cls, rate: float, scope: ScopeName = "local", steps: int = 10_000, **settings: Any) -> FineTuning:
        """Returns the baseline of Brown et al.: gradient descent with momentum, stopped by validation accuracy.

        Args:
          rate: They search it per model and method; what works lies between 1e-5 and 100.
          scope: `local` or `global`.
          steps: At most.
          settings: Others than the paper's; `early_stopping=False` without validation examples.
        """
        paper = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "decay_names": "weight"}
        paper |= {"stop_loss": None, "early_stopping": True}
        return cls(**{**paper, "scope": scope, "rate": rate, "steps": steps, **settings})

    @classmethod
    def yang(cls, penalty_weight: float = 0.0, penalty: Literal["l1", "l2"] = "l1", **settings: Any) -> FineTuning:
        """Returns the baseline of Yang et al., FT-l1 or FT-l2, step for step as in their code.

        Args:
          penalty_weight: From `YANG_PENALTIES`; 0: plain FT.
          penalty: Which.
          settings: Others than the code's.
        """
        return cls(**{"penalty": penalty, "penalty_weight": penalty_weight, "first_step": "sgd", **settings})

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns the feed-forward networks of blocks 8 to 10 of 12; for other scopes the last layer."""
        return last_feed_forward_blocks(model) if self.scope == "selection" else last_layer(model)

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the change that training made."""
        scope, before = self.train(model, selection, request, log)
        return Found(scope.operation(model, before), scope.selection)

    def train(
        self, model: nn.Module, selection: Selection, request: Request, log: EditLog
    ) -> tuple[scopes.Scope, dict[str, Tensor]]:
        """Trains the model in place and returns what was trained, and its values before."""
        labels = self._labels(request)
        scope = self._scope(model, selection, request, log)
        before = scope.values(model)
        at_once = self.room[1]
        objective = LabelLoss(model, request.inputs, labels, self.stop_loss, self.batch_size, self.seed, at_once)
        plan = self._plan(objective.batches, log)
        best = self._best_weights(model, scope, request, objective.batches)

        def done() -> bool:
            reached = objective.done()
            return (best is not None and best.done()) or reached

        descend(model, scope.trained, objective.loss, plan, log, done)
        if log.reason == "max_steps":
            log.why = "; ".join(filter(None, (objective.reached, contradiction(request.inputs, labels))))
        if best is not None:
            best.finish(log)
        _note_changes(model, scope, before, log)
        return scope, before

    def _labels(self, request: Request) -> Tensor:
        if request.labels is None:
            raise EditError("labels is missing: fine-tuning needs the class that each input should get.")
        different = sorted(set(request.labels.tolist()))
        if self.one_label and len(different) > 1:
            found = ", ".join(map(str, different[:5]))
            raise EditError(
                f"The labels are {found}, but these settings (one_label) take one label for all inputs, as the paper "
                "does. Pass one_label=False, or inputs of one label."
            )
        return request.labels

    def _scope(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> scopes.Scope:
        if self.scope == "local":
            return scopes.whole_layer(selection, model, self.title)
        if self.scope == "global":
            return scopes.from_layer_on(selection, model, request.inputs)
        if self.scope == "encoder":
            scope, log.entries["head"] = scopes.all_but_head(selection, model, request.inputs)
            if not scope.trained:
                raise EditError(
                    f"{self.title} trains every layer but the one that gives the logits, {log.entries['head']!r}, and "
                    f"this {type(model).__name__} has no other. Give a selection to train that one, or use finetune."
                )
            return scope
        return scopes.selected(selection, model)

    def _plan(self, batches: int, log: EditLog) -> Descent:
        steps = self.steps if self.epochs is None else self.epochs * batches
        schedule = None
        if self.schedule == "warm-up-cosine":
            schedule = functools.partial(warm_up_cosine, warm_up=self.warm_up, steps=steps)
            if steps <= self.warm_up:
                log.entries["warning"] = (
                    f"{steps} steps never leave the warm-up of {self.warm_up}: the rate ends at "
                    f"{self.rate * schedule(steps - 1):.3g} of {self.rate:g}. Lower warm_up, or train longer."
                )
        return Descent(
            optimizer=self.optimizer,
            rate=self.rate,
            steps=steps,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            decay_names=self.decay_names,
            first_step=self.first_step,
            penalty=self.penalty,
            penalty_weight=self.penalty_weight,
            clip=self.clip,
            schedule=schedule,
        )

    def _best_weights(self, model: nn.Module, scope: scopes.Scope, request: Request, every: int) -> BestWeights | None:
        if not self.early_stopping:
            return None
        return BestWeights(model, scope, validation_of(request), self.patience, every, self.room[1])


def _note_changes(model: nn.Module, scope: scopes.Scope, before: Mapping[str, Tensor], log: EditLog) -> None:
    """Notes how many numbers were trained, and how many of them did not move to speak of."""
    sizes = []
    for name, mask in scope.trained.items():
        change = (model.get_parameter(name).detach() - before[name]).abs()
        sizes.append(change.reshape(-1) if mask is None else change[mask])
    largest = max((float(size.max()) for size in sizes if size.numel()), default=0.0)
    still = sum(int((size <= UNMOVED * largest).sum()) for size in sizes)
    total = scope.weights(model)
    log.entries["trained_weights"] = total
    log.entries["unmoved_share"] = still / total if torch.isfinite(torch.tensor(largest)) else None
