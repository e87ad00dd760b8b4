"""What is kept of the gate gradients: a few sums per example and component, however many passes there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coar.estimators.gradient.design import Pass, gate_of

Doubles = npt.NDArray[np.float64]
BYTES = 6 * 4 + 2 * 2 + 8  # per example and component: six sums, two counts, the first gate


class GradientSums:
    """Sums over passes, (examples, components): of gradients where the component was sampled, and where it was kept.

    Attributes:
      even, odd: Sums of sampled gradients, over even and odd rounds.
      squares, slanted: Sums of sampled gradients squared, and times (gate - 1/2).
      kept, kept_squares: Sums of the gradients, and of their squares, where the gate was 1.
      sampled_count, kept_count: How many there were of each.
      output: Sum of outputs, (examples,).
    """

    def __init__(self, examples: int, components: int, dtype: torch.dtype) -> None:
        shape = (examples, components)
        self.even, self.odd, self.squares, self.slanted, self.kept, self.kept_squares = (
            torch.zeros(shape, dtype=dtype) for _ in range(6)
        )
        self.sampled_count, self.kept_count = (torch.zeros(shape, dtype=torch.int16) for _ in range(2))
        self.output = torch.zeros(examples, dtype=torch.float64)
        self.passes = 0

    def add(self, gates: Pass, outputs: Tensor, gradients: Tensor) -> None:
        """Adds a pass: its gates, outputs (examples,) and gradients (examples, components)."""
        sampled = torch.from_numpy(gates.sampled)
        kept = ~sampled if gates.closed is None else ~(sampled | torch.from_numpy(gates.closed))
        part = torch.where(sampled, gradients, 0)
        (self.even if gates.even else self.odd).add_(part)
        self.squares.addcmul_(part, part)
        self.slanted.addcmul_(part, torch.from_numpy(gates.u - 0.5).to(part.dtype))
        part = torch.where(kept, gradients, 0)
        self.kept.add_(part)
        self.kept_squares.addcmul_(part, part)
        self.sampled_count += sampled
        self.kept_count += kept
        self.output += outputs.double()
        self.passes += 1


@dataclass(frozen=True)
class Moments:
    """The sums as float64 arrays, with the sums over gates that follow from the design.

    Attributes, all (examples, components):
      count, even_count: How often a component was sampled, in all and in even rounds.
      total, even_mean, odd_mean: Of sampled gradients.
      squares, slanted: As in GradientSums.
      u, u_squares, u_even, u_odd: Sums of (gate - 1/2), of its square, and of it over even and odd rounds.
      slope, slope_variance: Mean gradient at gate 1, and the variance of a single one.
    """

    count: Doubles
    even_count: Doubles
    total: Doubles
    even_mean: Doubles
    odd_mean: Doubles
    squares: Doubles
    slanted: Doubles
    u: Doubles
    u_squares: Doubles
    u_even: Doubles
    u_odd: Doubles
    slope: Doubles
    slope_variance: Doubles

    @classmethod
    def of(cls, sums: GradientSums, start: Doubles) -> Moments:
        """Returns the moments; `start` (examples, components) are the first gates of the design."""
        count = _array(sums.sampled_count)
        u, u_squares, u_even = np.zeros_like(start), np.zeros_like(start), np.zeros_like(start)
        for number in range(int(count.max(initial=0))):
            part = np.where(number < count, gate_of(start, number) - 0.5, 0.0)
            u += part
            u_squares += part * part
            if number % 2 == 0:
                u_even += part
        even_count = np.ceil(count / 2)
        even, odd = _array(sums.even), _array(sums.odd)
        kept_count = _array(sums.kept_count)
        total, kept = even + odd, _array(sums.kept)
        slope = np.where(kept_count > 0, kept, total) / np.maximum(np.where(kept_count > 0, kept_count, count), 1)
        spread = _array(sums.kept_squares) - kept_count * slope**2
        return cls(
            count=count,
            even_count=even_count,
            total=total,
            even_mean=even / np.maximum(even_count, 1),
            odd_mean=odd / np.maximum(count - even_count, 1),
            squares=_array(sums.squares),
            slanted=_array(sums.slanted),
            u=u,
            u_squares=u_squares,
            u_even=u_even,
            u_odd=u - u_even,
            slope=slope,
            slope_variance=np.where(kept_count > 1, np.maximum(spread, 0.0), 0.0) / np.maximum(kept_count - 1, 1),
        )

    def mean_gates(self, sums: GradientSums) -> Doubles:
        """Returns the mean gate of every component over the passes."""
        return (_array(sums.kept_count) + self.u + self.count / 2) / sums.passes


def _array(values: Tensor) -> Doubles:
    return values.numpy().astype(np.float64)
