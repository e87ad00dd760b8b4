"""What happened while an edit was being found."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Any

from ablate.work.progress import progress_bar
from coar.errors import EditError

REASONS = ("converged", "max_steps", "noop", "failed")
MOST_LOSSES = 1000  # that a file keeps


class DivergedError(EditError):
    """A loss that is no number any more."""


class EditLog:
    """Losses, the reason for stopping and whatever else a method wants to be known. Ends in the edit's details."""

    def __init__(self, progress: bool = False) -> None:
        self.losses: list[float] = []
        self.entries: dict[str, Any] = {}
        self.reason, self.why = "", ""
        self._progress = progress
        self._began = time.perf_counter()

    @property
    def shows_progress(self) -> bool:
        """Whether progress was asked for."""
        return self._progress

    def part(self) -> EditLog:
        """Returns an empty log for one of several tries, which shows progress as this one does."""
        return EditLog(self._progress)

    def take(self, other: EditLog) -> None:
        """Tells what another log does from now on, instead of what this one has of losses and stopping."""
        self.losses, self.reason, self.why = other.losses, other.reason, other.why
        self.entries |= other.entries

    def step(self, loss: float) -> None:
        """Notes the loss that an update was made from.

        Raises:
          DivergedError: It is not finite.
        """
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss at step {len(self.losses)} is {loss}: the training diverged. Lower the rate, or look for "
                "inputs that the model does not take."
            )
        self.losses.append(loss)

    def stop(self, reason: str, why: str = "") -> None:
        """Notes why it ended: `converged`, `max_steps`, `noop` (nothing had to be done) or `failed`."""
        if reason not in REASONS:
            raise ValueError(f"reason is {reason!r}, expected one of {', '.join(REASONS)}.")
        self.reason, self.why = reason, why

    def progress(self, total: int, what: str) -> AbstractContextManager[Any]:
        """Returns a progress bar over `total` steps on stderr, if one was asked for; it has `update(n)`."""
        bar: AbstractContextManager[Any] = progress_bar(what, total, 0, "step", self._progress)
        return bar

    def summary(self) -> dict[str, Any]:
        """Returns everything as JSON-able values: steps, losses (thinned if they are many), stop, seconds, entries."""
        every = -(-len(self.losses) // MOST_LOSSES) or 1
        return {
            "steps": len(self.losses),
            "losses": self.losses[::every],
            "loss_first": self.losses[0] if self.losses else None,
            "loss_last": self.losses[-1] if self.losses else None,
            "stop": self.reason,
            "why": self.why,
            "seconds": round(time.perf_counter() - self._began, 3),
            **self.entries,
        }
