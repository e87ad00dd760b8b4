"""Output collision: make a layer compute for a transformed input what it computes for the original. No labels needed.

Source: Brown et al., Robustness of edited neural networks (2023), Section 2 and Appendices C and D.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ablate import Selection
from coar.editing.abstract import Editor, Found
from coar.editing.log import EditLog
from coar.editing.methods.pairs import Pairs, TargetName, ThroughoutPairs
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.editing.settings import Count, FromZero, Positive
from coar.editing.training.descent import Clip, Descent, OptimizerName, descend, descent_problems, value_of
from coar.editing.training.early_stopping import BestWeights, validation_of
from coar.editing.where import scopes
from coar.editing.where.blocks import Block, find_block
from coar.editing.where.defaults import one_layer
from coar.errors import EditError


@dataclass(frozen=True, kw_only=True)
class OutputCollision(Editor):
    """Lowers the squared distance between a layer's values for inputs and for their originals.

    A value is what `where/blocks.py` says: behind the normalisation, activation and pooling that follow the layer,
    or behind the residual block around it. The loss is the mean over a value's numbers, then over the examples, all of
    them in each step. Eval mode throughout; biases and normalisation never change.

    Cost per step: forward and backward of the block (`local`), or of the network up to it (`global`, or `symmetric`
    twice); of more inputs than `batch_size` another forward for `stop_loss`. Memory: beside the model three times the
    trained weights, the activations of one batch, and values of all inputs up to 256 MiB (beyond, they are computed
    anew in each step, by a second copy of the model).

    Decisions where the paper is open: it writes both values with the edited weights, which collapse solves (all weights
    0 give loss 0); the default here keeps the original's value fixed at the unedited model. `global` trains the
    weights of layers 1 to l, so that it is `local` for the first layer. Rate and number of steps are not published as
    defaults; those here are the toolkit's own, to be searched on validation examples.

    Attributes:
      scope: `local`: the selected weights of one layer. `global`: all weights of the layers that run before it, too.
      target: `original`: the unedited model's value for the original; `symmetric`: the edited model's, as printed.
      around: Module whose output is the value; None: as `coar.editing.where.blocks.find_block` says.
      optimizer: `rmsprop`, `sgd`, `adam` or `adamw`.
      rate: Learning rate.
      steps: At most so many updates.
      momentum: Of sgd.
      weight_decay: Of trained weights only.
      decay_names: Only parameters with this in their name decay; "": all.
      clip: Largest norm of the gradient; None: as it is.
      stop_loss: It ends, before an update, when the loss is this or less; None: not before the last step.
      early_stopping: Stop and keep weights by accuracy on the request's first validation set: needs `validation`.
      patience: For it: so many steps without a better score.
      batch_size: Examples at a time: changes rounding only.
    """

    name: ClassVar[str] = "output-collision"
    title: ClassVar[str] = "Output collision"
    source: ClassVar[str] = "Brown et al., Robustness of edited neural networks (2023), Section 2, Appendices C and D.3"
    needs: ClassVar[tuple[str, ...]] = ("originals",)
    quick: ClassVar[Mapping[str, Any]] = {"steps": 20}

    scope: Literal["local", "global"] = "local"
    target: TargetName = "original"
    around: str | None = None
    optimizer: OptimizerName = "sgd"
    rate: Positive = 1e-2
    steps: Count = 500
    momentum: FromZero = 0.9
    weight_decay: FromZero = 1e-4
    decay_names: str = "weight"
    clip: Clip | None = None
    stop_loss: FromZero | None = 0.0
    early_stopping: bool = False
    patience: Count = 50
    batch_size: Count = BATCH

    def _problems(self) -> list[str]:
        return descent_problems(self)

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the change of weights that brings the values together."""
        layer, _ = one_layer(selection, model, self.title)
        scope = (
            scopes.selected(selection, model)
            if self.scope == "local"
            else scopes.weights_up_to_layer(selection, model, request.inputs)
        )
        block = find_block(model, layer, self.around)
        log.entries["block"] = list(block.modules)
        log.entries["trained_weights"] = scope.weights(model)
        before = scope.values(model)
        pairs = self._pairs(model, block, request)
        batches = -(-pairs.examples // self.batch_size)
        distance = _Distance(pairs, self.target == "original", batches, self.stop_loss)
        best = self._best_weights(model, scope, request)

        def done() -> bool:
            reached = distance.done()
            return (best is not None and best.done()) or reached

        plan = Descent(
            optimizer=self.optimizer,
            rate=self.rate,
            steps=self.steps,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            decay_names=self.decay_names,
            clip=self.clip,
        )
        descend(model, scope.trained, distance.loss, plan, log, done)
        if best is not None:
            best.finish(log)
        return Found(scope.operation(model, before), scope.selection)

    def _pairs(self, model: nn.Module, block: Block, request: Request) -> Pairs | ThroughoutPairs:
        if request.originals is None:
            raise EditError("originals is missing: output collision needs each input before its transformation.")
        kind = Pairs if self.scope == "local" else ThroughoutPairs
        return kind(model, block, request.inputs, request.originals, self.batch_size)

    def _best_weights(self, model: nn.Module, scope: scopes.Scope, request: Request) -> BestWeights | None:
        if not self.early_stopping:
            return None
        return BestWeights(model, scope, validation_of(request), self.patience, batch_size=self.batch_size)


class _Distance:
    """Mean squared distance of values; of a single batch computed once for `done` and the `loss` that follows.

    Args:
      pairs: Of values and what they should be.
      frozen: Whether that is of the original model.
      batches: How many there are.
      stop_loss: `done` once the distance is this or less; None: never.
    """

    def __init__(self, pairs: Pairs | ThroughoutPairs, frozen: bool, batches: int, stop_loss: FromZero | None) -> None:
        self._pairs, self._frozen, self._batches, self._stop_loss = pairs, frozen, batches, stop_loss
        self._pending: Tensor | None = None

    def done(self) -> bool:
        if self._stop_loss is None:
            return False
        if self._batches > 1:
            return value_of(self._terms) <= self._stop_loss
        (self._pending,) = self._terms()
        return float(self._pending.detach()) <= self._stop_loss

    def loss(self) -> Iterator[Tensor]:
        pending, self._pending = self._pending, None
        return self._terms() if pending is None else iter([pending])

    def _terms(self) -> Iterator[Tensor]:
        for value, target in self._pairs.values(self._frozen):
            yield F.mse_loss(value, target) * (len(value) / self._pairs.examples)
