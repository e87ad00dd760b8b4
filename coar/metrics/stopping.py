"""When to stop training an edit: validation accuracy has fallen to half of its best, or has long not risen.

Source: Brown et al. (2023), Appendix D.3: stop once validation accuracy is below 0.5 x best so far; keep the best
weights. That never stops while the best is 0, so a patience is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from coar.metrics.checks import MetricError

FALL = 0.5


@dataclass
class StopRule:
    """Sees one validation score per epoch and says when to stop. `see` is the only thing that changes it.

    Attributes:
      fall: Stop when a score is below this share of the best so far.
      patience: Stop after so many scores in a row that are not above the best; None: never for that reason.
      best, best_index: The best score so far and its position; NaN and -1 before the first.
      seen: Scores seen.
      reason: Why to stop: `fell` or `patience`; "" until then.
    """

    fall: float = FALL
    patience: int | None = None
    best: float = math.nan
    best_index: int = -1
    seen: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.fall <= 1:
            raise MetricError(f"fall is {self.fall}, expected a share of the best score between 0 and 1.")
        if self.patience is not None and self.patience < 1:
            raise MetricError(f"patience is {self.patience}, expected at least 1 score, or None.")

    def see(self, score: float) -> bool:
        """Notes a score; returns whether to stop now. Keep the weights where `best_index` has just become the newest.

        Raises:
          MetricError: A score that is negative, NaN or infinite.
        """
        if not math.isfinite(score) or score < 0:
            raise MetricError(f"Score {self.seen} is {score}, expected a finite number from 0 up, e.g. an accuracy.")
        position, self.seen = self.seen, self.seen + 1
        if self.best_index < 0 or score > self.best:
            self.best, self.best_index = score, position
        elif score < self.fall * self.best:
            self.reason = "fell"
        elif self.patience is not None and position - self.best_index >= self.patience:
            self.reason = "patience"
        return bool(self.reason)


@dataclass(frozen=True)
class EarlyStop:
    """Where training stops.

    Attributes:
      index: Position of the score after which it stops; the last one where nothing stops it.
      stopped: Whether a rule stopped it.
      best, best_index: The best score up to there: whose weights are kept.
      reason: `fell`, `patience` or "".
      protocol: The rule, in words.
    """

    index: int
    stopped: bool
    best: float
    best_index: int
    reason: str
    protocol: str


def early_stop(scores: Iterable[float], fall: float = FALL, patience: int | None = None) -> EarlyStop:
    """Returns where a series of validation scores stops training. Mutates nothing.

    Args:
      scores: One per epoch, at least one.
      fall, patience: See `StopRule`.
    """
    rule = StopRule(fall, patience)
    for score in scores:
        if rule.see(score):
            break
    if not rule.seen:
        raise MetricError("There are no scores. Give at least one.")
    also = "" if patience is None else f" or is not above it for {patience} scores in a row"
    protocol = (
        f"Training stops when the validation score falls below {fall:g} x the best so far{also}; the weights of the "
        "best score are kept. That score chose the weights, so it is too good: report one of a third set of examples."
    )
    return EarlyStop(rule.seen - 1, bool(rule.reason), rule.best, rule.best_index, rule.reason, protocol)
