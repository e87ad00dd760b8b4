"""The gates of the gradient estimator: which components of which example get which gate in which pass.

In a pass every example has a random set S of components whose gates are uniform in (0, 1); the others are kept or, in
some designs, closed. The design is balanced: in a round of `groups` passes each component is in S exactly once per
example, and over the rounds its gates are spread evenly over (0, 1) instead of drawn independently.
Source: the identity behind it is Owen's multilinear extension (Management Science 18, 1972); see the guide page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coar.errors import FitError

GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this length, modulo 1, spread points evenly whatever their number
BACKGROUNDS = ("continuous", "mixed", "bernoulli")
_GROUP, _START, _CLOSED = 1, 2, 3  # streams of random numbers; 0 is what keep plans draw from

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pass:
    """The gates of one pass, (examples, components) each.

    Attributes:
      sampled: Whether the component is in S.
      closed: Whether its gate is 0; None: nowhere.
      u: The gate of sampled components; elsewhere meaningless.
      even: Whether the pass belongs to an even round.
    """

    sampled: Bools
    closed: Bools | None
    u: Doubles
    even: bool

    def gates(self) -> Doubles:
        """Returns the gates, in memory of their own."""
        gates = np.where(self.sampled, self.u, 1.0)
        if self.closed is not None:
            gates[self.closed] = 0.0
        return gates


@dataclass(frozen=True)
class GateDesign:
    """The gates of any pass of any example; a pass of an example depends on nothing but (seed, example, pass).

    Args:
      components: How many there are.
      ablate_fraction: 1 - the mean gate, over components and passes.
      background: What the others do while a component is sampled. "continuous": twice the ablate fraction of them is in
        S, too. "mixed": half of the ablating is done by gates in S, half by closed ones. "bernoulli": S is a single
        component, all others are closed with probability `ablate_fraction`: exact, and components times as many passes.
      seed: Of everything.
    """

    components: int
    ablate_fraction: float
    background: str
    seed: int

    @property
    def groups(self) -> int:
        """Passes of a round."""
        if self.background == "bernoulli":
            return self.components
        share = self.ablate_fraction * (2.0 if self.background == "continuous" else 1.0)
        return math.ceil(1 / min(share, 0.5) - 1e-9)

    @property
    def closed_share(self) -> float:
        """The share of the components outside S whose gates are closed, so that the mean gate is right."""
        if self.background == "bernoulli":
            return self.ablate_fraction
        in_s = 1 / self.groups
        return max(0.0, (self.ablate_fraction - in_s / 2) / (1 - in_s))

    def start(self, examples: range) -> Doubles:
        """Returns the first gate of every component in S, (examples, components), uniform in [0, 1)."""
        return np.stack([self._words(example, _START, 0) / 2.0**64 for example in examples])

    def group_of(self, examples: range, round_number: int) -> npt.NDArray[np.int32]:
        """Returns the group of every component in a round, (examples, components).

        Drawn independently, so that what is sampled together is as random as what is switched off together; for
        "bernoulli" one component each.
        """
        words = np.stack([self._words(example, _GROUP, round_number) for example in examples])
        if self.background == "bernoulli":
            return np.argsort(np.argsort(words, axis=1), axis=1).astype(np.int32)
        return (words % np.uint64(self.groups)).astype(np.int32)

    def closed(self, examples: range, number: int) -> Bools | None:
        """Returns which gates are closed in a pass if they are not in S, or None if none ever is."""
        share = self.closed_share
        if share <= 1e-12:
            return None
        threshold = np.uint64(int(share * 2**64))
        return np.stack([self._words(example, _CLOSED, number) < threshold for example in examples])

    def passes(self, examples: range) -> GatePasses:
        """Returns the passes of these examples."""
        return GatePasses(self, examples)

    def _words(self, example: int, stream: int, number: int) -> npt.NDArray[np.uint64]:
        key = np.array([self.seed, example], dtype=np.uint64)
        counter = np.array([0, 0, stream, number], dtype=np.uint64)
        words: npt.NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(self.components)
        return words


class GatePasses:
    """The passes of some examples, one after the other."""

    def __init__(self, design: GateDesign, examples: range) -> None:
        self.design = design
        self.examples = examples
        self.done = 0
        self.start = design.start(examples)
        self._group: npt.NDArray[np.int32] | None = None

    def next(self) -> Pass:
        """Returns the next pass."""
        round_number, group = divmod(self.done, self.design.groups)
        if group == 0 or self._group is None:
            self._group = self.design.group_of(self.examples, round_number)
        sampled = self._group == group
        closed = self.design.closed(self.examples, self.done)
        if closed is not None:
            closed &= ~sampled
        self.done += 1
        return Pass(sampled, closed, gate_of(self.start, round_number), round_number % 2 == 0)


def gate_of(start: Doubles, round_number: int) -> Doubles:
    """Returns the gates of sampled components in a round: evenly spread over (0, 1) as rounds go on."""
    return (start + round_number * GOLDEN) % 1.0


def check_design(ablate_fraction: float, background: str) -> None:
    """Raises FitError for an ablate fraction or background that there is no design for."""
    if not 0 < ablate_fraction <= 0.5:
        raise FitError(
            f"ablate_fraction is {ablate_fraction}, expected a number above 0 and at most 0.5 for estimates from "
            "gradients. For more, run a campaign and fit it (coar.fit)."
        )
    if background not in BACKGROUNDS:
        raise FitError(f"background is {background!r}, expected one of {', '.join(BACKGROUNDS)}.")
