"""What something costs in plain forward passes, measured in the same run: comparable between machines and moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ablate import Engine, Examples
from coar.errors import QueryError

LEAST_SECONDS = 0.2  # of plain passes before a measured piece, and as much after it
LEAST_PASSES = 3


@dataclass
class Cost:
    """What a piece of work took; NaN until it has ended.

    Attributes:
      seconds: Wall-clock time.
      plain_seconds: One plain forward pass over the same examples, mean of what it took right before and right after.
    """

    seconds: float = float("nan")
    plain_seconds: float = float("nan")

    @property
    def forwards(self) -> float:
        """How many plain forward passes would have taken as long."""
        return self.seconds / self.plain_seconds


class CostMeter:
    """Measures what work on some examples costs, in plain forward passes of the engine's model over them.

    `with meter.measure() as cost: ...` and then `cost.forwards`. Plain passes are timed right before and right after
    each measured piece, so that a machine that has slowed down slows both.

    A plain pass is the engine's own copy of the model (folded, laid out and compiled as the engine runs it), in its
    batches, on examples that lie on its device if they fit there, without gates, outputs or checks. One row of
    `engine.outputs` with everything kept is up to some percent dearer, which would make everything else look cheaper.

    Args:
      engine: Whose model is the unit.
      examples: The examples the measured work is about.
      least_seconds: Plain passes are repeated until they took so long, before and after; their median counts.
      clock: Returns seconds.
    """

    def __init__(
        self,
        engine: Engine,
        examples: Examples,
        *,
        least_seconds: float = LEAST_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not (np.isfinite(least_seconds) and least_seconds >= 0):
            raise QueryError(f"least_seconds is {least_seconds}, expected a number of seconds >= 0.")
        self.engine = engine
        self.examples = examples
        self.least_seconds = least_seconds
        self._clock = clock
        engine.check(examples)  # makes the engine's gated_model, if nothing has run yet
        self._pass()  # warms up: compiles, places the examples

    def __repr__(self) -> str:
        return f"<CostMeter: in plain forwards of {len(self.examples):,} examples, {self.engine!r}>"

    @contextmanager
    def measure(self) -> Iterator[Cost]:
        """Yields a Cost that is filled in when the block ends; if it raises, the cost stays NaN.

        Cost: plain passes of at least twice `least_seconds`, at least six.
        """
        cost = Cost()
        before = self._plain()
        start = self._now()
        yield cost
        seconds = self._now() - start
        cost.plain_seconds = (before + self._plain()) / 2
        cost.seconds = seconds

    def _plain(self) -> float:
        """Returns the median seconds of one plain pass."""
        times: list[float] = []
        while len(times) < LEAST_PASSES or sum(times) < self.least_seconds:
            start = self._now()
            self._pass()
            times.append(self._now() - start)
        return median(times)

    def _pass(self) -> None:
        run_plain(self.engine, self.examples)

    def _now(self) -> float:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return self._clock()


def run_plain(engine: Engine, examples: Examples, take: Callable[[Tensor], object] = lambda logits: None) -> None:
    """Runs the engine's model, unablated, once over the examples; `take` gets each batch's logits. Mutates nothing."""
    with engine.session(examples) as (loops, chunks):  # outputs() would count gates and checks as plain
        for _, placed in chunks:
            for _, inputs, targets in placed.batches(loops.batch_size):
                take(loops.gated_model.plain(loops.padded(inputs, loops.batch_size))[: len(targets)])
