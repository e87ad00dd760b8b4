"""Early stopping of an edit: validation accuracy decides when to stop, and whose weights are kept."""

from __future__ import annotations

from torch import Tensor, nn

from ablate import Examples
from coar.editing.log import EditLog
from coar.editing.predicting import predictions
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.editing.where.scopes import Scope
from coar.errors import EditError
from coar.metrics import StopRule, accuracy

ADVICE = (
    "The validation examples chose the weights, so their accuracy is too good: report that of a third set of examples."
)


class BestWeights:
    """Scores the model now and then, and keeps the trained weights of the best score.

    Source: Brown et al. (2023), Appendix D.3: stop once accuracy on edited validation examples is below half of the
    best so far, keep the best weights. That never stops while the best is 0; so there is a patience, too.

    Args:
      model: The model in training, in eval mode.
      scope: What trains.
      examples: Validation examples of the edit.
      patience: Stop after so many scores in a row that are not above the best.
      every: Steps from one score to the next.
      batch_size: Examples per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        scope: Scope,
        examples: Examples,
        patience: int,
        every: int = 1,
        batch_size: int = BATCH,
    ) -> None:
        self._model, self._scope, self._examples, self._every = model, scope, examples, every
        self._batch_size = batch_size
        self._rule = StopRule(patience=patience)
        self._step = 0
        self._best: dict[str, Tensor] = {}

    def done(self) -> bool:
        """Scores the model if it is time to, and returns whether to stop. Asked once before each step, and at the end.

        Step 0, the original model, counts: weights that do worse are no edit.
        """
        step, self._step = self._step, self._step + 1
        if step % self._every:
            return False
        found = predictions(self._model, self._examples, batch_size=self._batch_size, check=False)
        score = accuracy(found, self._examples.targets).value
        stop = self._rule.see(score)
        if self._rule.best_index == self._rule.seen - 1:
            self._best = self._scope.values(self._model)
        return stop

    def finish(self, log: EditLog) -> None:
        """Puts the best weights back into the model and notes which they are."""
        self._scope.put(self._model, self._best)
        best = self._rule.best_index * self._every
        log.entries["early_stopping"] = {
            "best_step": best,
            "best_accuracy": self._rule.best,
            "scores": self._rule.seen,
            "why": self._rule.reason or "not stopped",
            "advice": ADVICE,
        }
        if log.reason == "noop":
            return
        if not best:
            log.stop("failed", "No step raised accuracy on the validation examples: the weights are the original ones.")
        elif self._rule.reason:
            log.stop("converged", f"Validation accuracy: {self._rule.reason}; the weights of step {best} are kept.")


def validation_of(request: Request) -> Examples:
    """Returns the examples that early stopping looks at. Raises EditError if the request has none."""
    if request.validation is None:
        raise EditError(
            "early_stopping needs validation, a pair of ablate.Examples, (to be changed, ordinary), in the "
            "request. Give it, or pass early_stopping=False."
        )
    return request.validation[0]
