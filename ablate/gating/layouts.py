"""Where the examples of a batch are in a tensor, found by comparing runs of one, two and three of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RTOL = 1e-7  # in float64: GEMM blocking differs between batches of one and of two


@dataclass(frozen=True)
class ExampleLayout:
    """Where the examples are in a tensor: along `axis`, each in consecutive places (`blocked`) or in turn.

    `each` is the number of places of an example, `ndim` that of the tensor's axes: with another input shape, others.
    """

    axis: int
    blocked: bool = True
    each: int = field(default=1, compare=False)
    ndim: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"examples along axis {self.axis}{'' if self.blocked else ', interleaved'}"

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns what examples give together of what each of them gives alone."""
        if self.blocked:
            return torch.cat(list(parts), self.axis)
        return torch.stack(list(parts), self.axis + 1).flatten(self.axis, self.axis + 1)

    def first_of_two(self, values: Tensor) -> Tensor:
        """Returns the first example's part of what two give."""
        if self.blocked:
            return values.narrow(self.axis, 0, self.each)
        return values[(slice(None),) * self.axis + (slice(None, None, 2),)]


def layout_of_all(runs: Sequence[Any], channels: int, twice: bool) -> ExampleLayout | None:
    """Returns the layout of what passed in the runs of a, of b, of both and of b, a, b; None if there is no one.

    `twice`: the runs of a and b were of two of the same.
    """
    a, b, both, three = runs
    layout = (find_layout_of_pairs if twice else find_layout)(a, b, both, channels)
    if layout is None or not isinstance(three, Tensor) or three.ndim != both.ndim:
        return None
    if three.shape[layout.axis] != 3 * layout.each:
        return None
    if twice:
        a, b = layout.first_of_two(a), layout.first_of_two(b)
    return layout if _close(three, layout.joined([b, a, b])) else None


def find_layout(a: Any, b: Any, both: Any, channels: int) -> ExampleLayout | None:
    """Returns how `both` is made of `a` and `b`, None if it is not; `channels` is the axis that cannot be theirs."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(both, Tensor)) or a.shape != b.shape:
        return None
    if a.ndim != both.ndim:
        return None
    for axis in range(both.ndim):
        if axis == channels % both.ndim:
            continue
        if both.shape != (*a.shape[:axis], 2 * a.shape[axis], *a.shape[axis + 1 :]):
            continue
        blocked = _close(both, torch.cat([a, b], axis))
        in_turn = a.shape[axis] > 1 and _close(both, torch.stack([a, b], axis + 1).flatten(axis, axis + 1))
        if blocked != in_turn:  # both where all values are equal or NaN: not to be told apart
            return ExampleLayout(axis, blocked, a.shape[axis], a.ndim)
    return None


def find_layout_of_pairs(a: Any, b: Any, both: Any, channels: int) -> ExampleLayout | None:
    """Returns what `find_layout` does, where `a` and `b` come of runs on two of the same example."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(both, Tensor)):
        return None
    if not a.shape == b.shape == both.shape:
        return None
    for axis in range(both.ndim):
        size = both.shape[axis]
        if axis == channels % both.ndim or size % 2:
            continue
        place = torch.arange(size, device=both.device).view(-1, *[1] * (both.ndim - 1 - axis))
        blocked = _close(both, torch.where(place < size // 2, a, b))
        in_turn = size > 2 and _close(both, torch.where(place % 2 == 0, a, b))
        if blocked != in_turn:
            return ExampleLayout(axis, blocked, size // 2, both.ndim)
    return None


def _close(one: Tensor, two: Tensor) -> bool:
    equal = torch.equal(one, two)
    if equal or not two.is_floating_point():
        return equal
    # a mask's -inf or -1e9, which is the same in both, must not make room for differences between the others
    different = two[torch.isfinite(two) & (one != two)]
    scale = float(different.abs().max()) if different.numel() else 0.0
    rtol = RTOL if one.dtype == torch.float64 else 1e-4
    return torch.allclose(one, two, rtol=rtol, atol=rtol * scale, equal_nan=True)
