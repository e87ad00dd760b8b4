"""What the simple estimators share: what they hand back, and checks of what they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ablate import Engine
from coar.errors import FitError
from coar.estimators.abstract import BlockEstimate


def plain_estimate(weights: npt.NDArray[Any], full: npt.NDArray[Any], passes: int) -> BlockEstimate:
    """Returns weights as an estimate with standard errors of zero; with everything kept it predicts the output.

    Args:
      weights: (examples, components).
      full: Outputs with everything kept, (examples,).
      passes: Forwards, or forwards and backwards, of each example.
    """
    rounded = weights.astype(np.float32)
    return BlockEstimate(
        weights=rounded,
        stderr=np.zeros_like(rounded),
        bias=(full - rounded.sum(axis=1, dtype=np.float64)).astype(np.float32),
        passes=np.full(len(full), passes, dtype=np.float32),
    )


def gauss_legendre(steps: int) -> tuple[list[float], list[float]]:
    """Returns points and shares of the mean over [0, 1] that is exact for polynomials of degree 2 steps - 1."""
    points, shares = np.polynomial.legendre.leggauss(steps)
    return ((points + 1) / 2).tolist(), (shares / 2).tolist()


def check_steps(method: str, steps: int) -> None:
    """Raises FitError unless `steps` is an integer of at least 1."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise FitError(f"{method}: steps is {steps!r}, expected an integer of at least 1.")


def check_baseline(method: str, baseline: float) -> None:
    """Raises FitError unless `baseline` is a finite number."""
    if isinstance(baseline, bool) or not isinstance(baseline, (int, float)) or not np.isfinite(baseline):
        raise FitError(
            f"{method}: baseline is {baseline!r}, expected one finite number for every value of the input as the "
            "model sees it."
        )


def require_components(engine: Engine) -> None:
    """Raises FitError for an index without components."""
    if not len(engine.index):
        raise FitError(
            "The engine's index has no components: there is nothing to attribute to. Make one with "
            "ComponentIndex.from_model(model), or widen its kinds or include."
        )
