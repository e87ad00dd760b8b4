"""What one choice costs: a campaign of so many rows and its fit, or an estimate of so many passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ablate import CampaignSpec, Engine, Examples
from ablate.engine.memory import MemoryPlan
from coar.errors import QueryError
from coar.estimators.gradient.estimator import Gradient
from coar.planning.curve import GRADIENT, REGRESSION, Expected, expected
from coar.planning.disk import attribution_bytes, campaign_bytes
from coar.planning.memory import engine_peak, estimate_plan, fit_plan, fitted_rows
from coar.planning.speeds import Speeds, fit_seconds

QUALITY_ROWS = 50  # of `coar.estimate`
BLOCK_EXAMPLES = 256


@dataclass(frozen=True)
class Option:
    """One way to attributions of all examples. Seconds and hours are of what is left to do.

    Attributes:
      way: "regression" (a campaign, then a fit) or "gradient" (an estimate).
      budget: Rows of the campaign, or passes of the estimate.
      purpose: Why it is here: "spec" (the spec says so), "choice" (to choose from) or "target".
      quality: The held-out correlation to expect.
      forwards, backwards: Passes of single examples through the model, for the whole.
      blocks, blocks_left: Units of work, in all and not finished yet.
      seconds: With one worker; of them `fit_seconds` for the fit, which is one process.
      wall_seconds: With the plan's workers.
      hours: GPU hours, or hours of CPU cores, of all workers together.
      bytes: On disk, when finished: the campaign's and the attributions'.
      engine_memory: Peak of the model on its device, in bytes.
      memory: Peak of arrays beside it, in bytes.
      fit_memory: What the fit needs, in bytes; 0 for an estimate.
    """

    way: str
    budget: int
    purpose: str
    quality: Expected
    forwards: int
    backwards: int
    blocks: int
    blocks_left: int
    seconds: float
    fit_seconds: float
    wall_seconds: float
    hours: float
    bytes: int
    engine_memory: int
    memory: int
    fit_memory: int

    @property
    def name(self) -> str:
        """The way and its budget, in words."""
        return f"{self.way}, {self.budget:,} {'rows' if self.way == REGRESSION else 'passes'}"

    def as_dict(self) -> dict[str, Any]:
        """Returns the option as JSON-able values."""
        return {**asdict(self), "quality": {**asdict(self.quality), "low": self.quality.low, "high": self.quality.high}}


@dataclass(frozen=True)
class Planned:
    """What is planned for: everything that all options have in common."""

    spec: CampaignSpec
    engine: Engine
    examples: Examples
    identity: Mapping[str, Any]
    engine_memory: MemoryPlan
    speeds: Speeds
    workers: int

    @property
    def components(self) -> int:
        """How many components there are."""
        return len(self.engine.index)

    def regression(self, rows: int, purpose: str, blocks_done: int = 0) -> Option:
        """Returns what a campaign of so many rows and its ridge fit cost. Runs nothing."""
        examples, speeds = self.examples, self.speeds
        block_rows = min(self.spec.settings.block_rows, rows)
        fit_memory, block_examples = fit_plan(rows, self.components, len(examples), block_rows)
        fitted = fitted_rows(rows)
        each = block_rows * len(examples) * speeds.ablated + len(examples) * speeds.read
        blocks = -(-rows // block_rows)
        left = _blocks_left(blocks, blocks_done)
        fitting = fit_seconds(speeds, fitted, self.components, len(examples))
        own = self.spec, self.engine.index, examples, self.identity
        return Option(
            way=REGRESSION,
            budget=rows,
            purpose=purpose,
            quality=expected(REGRESSION, fitted / self.components),
            forwards=rows * len(examples),
            backwards=0,
            blocks=blocks,
            blocks_left=left,
            **self._times(left, each, rows / (blocks * block_rows), fitting),
            bytes=campaign_bytes(*own, rows) + attribution_bytes(*own, block_examples, REGRESSION),
            engine_memory=engine_peak(self.engine, self.engine_memory, examples, gradients=False),
            # outputs as computed, as stored and as read back; keep-vectors likewise
            memory=3 * block_rows * (4 * len(examples) + self.components),
            fit_memory=fit_memory,
        )

    def gradient(self, estimator: Gradient, passes: int, purpose: str, blocks_done: int = 0) -> Option:
        """Returns what an estimate of so many passes costs. Runs nothing.

        Raises:
          QueryError: There are no gradients.
          FitError: It does not fit into the default memory budget.
        """
        examples, speeds = self.examples, self.speeds
        if speeds.gradient is None:
            raise QueryError(f"There are no gradients to plan with: {speeds.no_gradients}")
        own = replace(estimator, passes=passes)
        memory, block = estimate_plan(own, examples, self.components, QUALITY_ROWS, BLOCK_EXAMPLES)
        forwards = QUALITY_ROWS + own.forward_rows
        example = passes * speeds.gradient + speeds.finish + forwards * speeds.ablated + speeds.read
        blocks = -(-len(examples) // block)
        left = _blocks_left(blocks, blocks_done)
        return Option(
            way=GRADIENT,
            budget=passes,
            purpose=purpose,
            quality=expected(GRADIENT, passes),
            forwards=(passes + forwards) * len(examples),
            backwards=passes * len(examples),
            blocks=blocks,
            blocks_left=left,
            **self._times(left, block * example, len(examples) / (blocks * block), 0.0),
            bytes=attribution_bytes(self.spec, self.engine.index, examples, self.identity, block, GRADIENT),
            engine_memory=engine_peak(self.engine, self.engine_memory, examples, gradients=True),
            memory=memory,
            fit_memory=0,
        )

    def _times(self, left: int, each: float, full: float, fitting: float) -> dict[str, Any]:
        """Returns the times of blocks of `each` seconds, on average a share `full` of that; none left: of the fit."""
        if not left:
            return self._time_fields(fitting, fitting, fitting, fitting)
        start, work = self.speeds.start, left * each * full
        workers = min(self.workers, left)
        wall = start + min(work, -(-left // workers) * each) + fitting
        return self._time_fields(start + work + fitting, fitting, wall, workers * start + work + fitting)

    def _time_fields(self, seconds: float, fitting: float, wall: float, busy: float) -> dict[str, Any]:
        cuda = self.engine.device.type == "cuda"
        units = (busy - fitting) if cuda else busy * self.speeds.threads
        return {"seconds": seconds, "fit_seconds": fitting, "wall_seconds": wall, "hours": units / 3600}


def _blocks_left(blocks: int, done: int) -> int:
    return max(0, blocks - done)
