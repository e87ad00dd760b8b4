"""KeepPlan: many random keep-vectors, of which row i depends on nothing but (seed, i)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ablate.errors import KeepError
from stores import content_hash

# Named in every plan: another way to draw is another plan.
ALGORITHM = "philox4x64(key=(seed, row)) raw 64-bit word per component, ablated if word < ablate_fraction * 2**64"
SEVERAL = "; row i has ablate_fraction[i % (number of fractions)]"


@dataclass(frozen=True)
class KeepPlan:
    """`rows` keep-vectors that ablate each component independently with probability `ablate_fraction`.

    Row i is drawn from a counter-based generator keyed by (seed, i): any row can be made alone, in any order, on any
    worker, in any numpy version, with the same bits. Of several ablate fractions, row i has fraction i % their number:
    the rows it would have in a plan of that fraction alone.
    """

    components: int
    rows: int
    ablate_fraction: float | Sequence[float]
    seed: int = 0

    def __post_init__(self) -> None:
        if self.components < 1 or self.rows < 1:
            raise KeepError(f"A plan needs components and rows >= 1, got {self.components} and {self.rows}.")
        several = not isinstance(self.ablate_fraction, (int, float, np.number))
        given: Any = self.ablate_fraction
        fractions = tuple(float(fraction) for fraction in (given if several else (given,)))
        for fraction in fractions:
            if not 0 < fraction < 1:
                raise KeepError(f"ablate_fraction is {fraction}, expected a number between 0 and 1 (exclusive).")
        if not fractions or len(set(fractions)) < len(fractions):
            raise KeepError(
                f"ablate_fraction is {list(fractions)}, expected a number, or one or more numbers that differ."
            )
        object.__setattr__(self, "ablate_fraction", fractions if len(fractions) > 1 else fractions[0])  # frozen
        if not 0 <= self.seed < 2**63:
            raise KeepError(f"seed is {self.seed}, expected an integer from 0 to 2**63 - 1.")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The ablate fractions: row i has fraction i % their number."""
        fraction: Any = self.ablate_fraction
        return fraction if isinstance(fraction, tuple) else (fraction,)

    def row(self, i: int) -> npt.NDArray[np.bool_]:
        """Returns keep-vector i, (components,) bool, True = kept."""
        if not 0 <= i < self.rows:
            raise IndexError(f"Keep row {i} does not exist; rows are 0 to {self.rows - 1}.")
        words = np.random.Philox(key=np.array([self.seed, i], dtype=np.uint64)).random_raw(self.components)
        threshold = np.uint64(int(self.fractions[i % len(self.fractions)] * 2**64))
        return np.asarray(words >= threshold)

    def take(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Returns keep-vectors start to stop - 1, (stop - start, components) bool. Cost: about 5 ns per bit."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"Keep rows {start} to {stop} do not exist; give 0 <= start <= stop <= {self.rows}.")
        keep = np.empty((stop - start, self.components), dtype=np.bool_)
        for i in range(start, stop):
            keep[i - start] = self.row(i)
        return keep

    def describe(self) -> dict[str, Any]:
        """Returns what the plan is made of, as JSON-able values."""
        one = len(self.fractions) == 1
        return {
            "algorithm": ALGORITHM if one else ALGORITHM + SEVERAL,
            "components": int(self.components),  # numpy's numbers are no JSON
            "rows": int(self.rows),
            "ablate_fraction": self.fractions[0] if one else list(self.fractions),
            "seed": int(self.seed),
        }

    @property
    def hash(self) -> str:
        """The sha256 (hex) of the description."""
        return content_hash(self.describe())
