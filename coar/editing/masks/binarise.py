"""From a continuous mask to bits: exactly the share asked for, or everything above a threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coar.errors import EditError

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996 in floats, and 29 is meant


def binarise(values: Tensor, *, density: float | None = None, threshold: float | None = None) -> Tensor:
    """Returns the bits of a mask, (bits,) bool. Mutates nothing.

    Args:
      values: A continuous mask, (bits,), in [0, 1]; all rows compete with each other.
      density: Share of bits to set: exactly `floor(density * bits)`, the largest; of equal values the first.
      threshold: Or: set the bits above it; 0 sets all, as no value of a hypernetwork is 0.

    Raises:
      EditError: Both or none of density and threshold, one out of range, a mask that is not finite, or no bit set.
    """
    check_choice(density, threshold)
    if values.ndim != 1 or not len(values):
        raise EditError(f"The mask has shape {tuple(values.shape)}, expected (bits,): one mask, averaged over samples.")
    if not torch.isfinite(values).all():
        raise EditError("The mask holds values that are not finite: check the inputs and the hypernetwork's training.")
    if threshold is not None:
        bits = values > threshold
        if not bits.any():
            raise EditError(
                f"No value of the mask is above the threshold {threshold:g}, the largest is {float(values.max()):.4g}. "
                "Lower the threshold, or give a density."
            )
        return bits
    k = bits_at(density or 0.0, len(values))
    bits = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    bits[torch.argsort(values, descending=True, stable=True)[:k]] = True
    return bits


def check_choice(density: float | None, threshold: float | None) -> None:
    """Raises EditError unless exactly one of density (0 to 1) and threshold (0 to below 1) is given."""
    if (density is None) == (threshold is None):
        given = "both are given" if density is not None else "neither is given"
        raise EditError(f"A mask needs a density or a threshold, not both: {given}. Leave the other one None.")
    if density is not None and not (math.isfinite(density) and 0 < density <= 1):
        raise EditError(f"density is {density}, expected a share above 0 and up to 1, e.g. 0.05.")
    if threshold is not None and not (math.isfinite(threshold) and 0 <= threshold < 1):
        raise EditError(f"threshold is {threshold}, expected a number from 0 (every bit) to below 1.")


def bits_at(density: float, bits: int) -> int:
    """Returns how many of `bits` a density sets. Raises EditError if it is none."""
    k = math.floor(density * bits + _ROUNDING)
    if k < 1:
        raise EditError(
            f"density {density:g} of {bits} components is {density * bits:.3g}: none would be selected. Give at least "
            f"{1 / bits:.3g}."
        )
    return k
