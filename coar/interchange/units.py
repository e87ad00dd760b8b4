"""Units of attributions: of the output per component, as here, or of the published solver, per standard deviation.

The published regression (MadryLab/fast_l1) fits to standardised masks, `(mask - p) / sqrt(p (1 - p))` with the share p
of True. So its `weight` is what one standard deviation of a mask does, sqrt(p (1 - p)) of the effect of a component
(0.22 of it at 5 % ablated), and its `bias` is the mean output, not that with every component ablated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from coar.interchange.errors import InterchangeError

Array = npt.NDArray[Any]
Fraction = float | Literal["unknown"] | None
UNKNOWN: Literal["unknown"] = "unknown"
OUTPUT_UNITS, OTHER_UNITS = "output", "unknown"  # as the identity of an imported store has them


@dataclass(frozen=True)
class Conversion:
    """How a file's numbers become attributions in units of the output, of masks with True = kept.

    Attributes:
      true_share: The share of True in the standardised masks; None: they were not standardised, or it is not known.
      turn: Whether True meant ablated.
    """

    true_share: float | None
    turn: bool

    def __call__(self, weight: Array, bias: Array) -> tuple[Array, Array]:
        """Returns (weights, bias), float64, of `weight` (examples, components) and `bias` (examples,)."""
        weights, base = weight.astype(np.float64), bias.astype(np.float64)
        with np.errstate(invalid="ignore"):  # of examples without an attribution, which are kept
            if self.true_share is not None:
                weights = weights / deviation(self.true_share)
                base = base - self.true_share * weights.sum(axis=1)
            if self.turn:  # w * ablated + b = -w * kept + (b + the sum of all w)
                base, weights = base + weights.sum(axis=1), -weights
        return weights, base


def deviation(share: float) -> float:
    """Returns the standard deviation of masks of which this share is True."""
    return float(np.sqrt(share * (1 - share)))


def standardised(weights: Array, bias: Array, kept: float) -> tuple[Array, Array]:
    """Returns (weight, bias) as the published solver has them: the inverse of Conversion(kept, False)."""
    exact = weights.astype(np.float64)
    return exact * deviation(kept), bias + kept * exact.sum(axis=1)


def known_fraction(where: str, told: float | str | None, spec: float | None, file: float | None) -> float | None:
    """Returns the ablate fraction of a fit; None: told to be unknown.

    Raises:
      InterchangeError: Nobody says it, what is said is no fraction, or the file says another.
    """
    told = spec if told is None else told
    if told is None:
        told = file
    if told is None:
        raise InterchangeError(
            f"{where}: its weights are per standard deviation of the masks, and to say them in units of the output "
            "takes the share of components that was ablated for the fit. Give ablate_fraction= (`--ablate-fraction "
            "0.05`, in the published runs); or 'unknown': then what needs these units is refused later on. Of weights "
            "that are in units of the output already, say standardised=False (`--not-standardised`)."
        )
    if told == UNKNOWN:
        return None
    if isinstance(told, str) or not 0 < told < 1:
        raise InterchangeError(
            f"ablate_fraction is {told!r}, expected a number between 0 and 1 (exclusive), or unknown."
        )
    if file is not None and abs(told - file) > 1e-6:
        raise InterchangeError(
            f"{where}: the ablate fraction is given as {told:g}, but the file says {file:g}. Correct it, or the spec."
        )
    return float(told)
