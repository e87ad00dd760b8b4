"""Whether two runs of a model gave the same numbers: finite ones to rounding, NaN and infinities in the same places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """Where two results differ: by how much at most, and of which size the numbers are there."""

    difference: float
    scale: float

    def __str__(self) -> str:
        return f"{self.difference:.3g} of {self.scale:.3g}"


def same(one: Tensor, two: Tensor) -> bool:
    """Returns whether two tensors are equal, entry by entry; NaN equals NaN."""
    return one.shape == two.shape and bool(((one == two) | (one.isnan() & two.isnan())).all())


def gap(got: Tensor, expected: Tensor, tolerance: float) -> Gap | None:
    """Returns where two results (examples, ...) of one shape differ by more than a tolerance, None if nowhere.

    What counts is an entry's own size and the usual one, not the largest: classes masked with -inf or -1e9 must not
    hide that others differ. NaN and infinities have to be the same in both.

    Args:
      got, expected: On one device, of one dtype.
      tolerance: As a share of an entry's size and of the usual distance between examples.
    """
    finite = expected.isfinite()
    if not same(got.where(~finite, 0), expected.where(~finite, 0)) or not expected.is_floating_point():
        return None if same(got, expected) else Gap(float("inf"), _largest(expected[finite]))
    differs = finite & (got != expected)
    if not bool(differs.any()):
        return None
    distances = (expected.amax(0) - expected.amin(0))[finite.all(0)]
    usual = _lower_quarter(distances[distances > 0])
    size = expected.abs()
    allowed = tolerance * (usual + size.clamp(min=_lower_quarter(size[differs])))
    difference = (got - expected).abs()
    wrong = differs & ~(difference <= allowed)
    if not bool(wrong.any()):
        return None
    return Gap(_largest(difference[wrong]), max(usual, _largest(size[wrong])))


def _lower_quarter(values: Tensor) -> float:
    """Returns the number that a quarter of the values do not exceed: of the usual size, whatever else is among them."""
    return float(values.flatten().kthvalue(1 + values.numel() // 4).values) if values.numel() else 0.0


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
