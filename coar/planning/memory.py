"""Memory before anything runs: the engine's own measured peaks, and the budgets of fitting and estimating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from ablate import Engine, Examples
from ablate.engine.memory import MemoryPlan
from ablate.engine.placing import HOST_BUDGET
from coar.errors import FitError
from coar.estimators.abstract import Estimator
from coar.estimators.regression import budget
from coar.estimators.regression.fit import RIDGE_GRID
from coar.estimators.regression.rows import FIT, TEST, CampaignRows

DEFAULT = 2 * 2**30  # the budget of `coar.fit` and `coar.estimate` where none is given
COMFORTABLE = 64  # examples fitted at a time
HELD_OUT = 10  # every tenth row measures quality


@dataclass(frozen=True)
class _Campaign:
    component_count: int
    example_count: int
    block_rows: int


@dataclass(frozen=True)
class _PlannedRows:
    """As much of the rows of a campaign as their memory budget asks for."""

    campaign: _Campaign
    rows: int

    def count(self, role: int) -> int:
        return {FIT: fitted_rows(self.rows), TEST: self.rows // HELD_OUT}.get(role, 0)


def fitted_rows(rows: int) -> int:
    """Returns how many rows of a campaign `coar.fit` fits by default; the others measure quality."""
    return rows - rows // HELD_OUT


def fit_plan(rows: int, components: int, examples: int, block_rows: int) -> tuple[int, int]:
    """Returns the bytes that a ridge fit needs to run well, and the examples of a block of its store by default."""
    planned = cast(CampaignRows, _PlannedRows(_Campaign(components, examples, block_rows), rows))

    def make(memory: int, block: int | None) -> budget.FitMemory | None:
        try:
            return budget.FitMemory.make(planned, "ridge", len(RIDGE_GRID), memory, False, block)
        except FitError:
            return None

    wanted = min(COMFORTABLE, examples)
    low, high = 0, 2**60
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if make(middle, wanted) else (middle, high)
    chosen = make(max(DEFAULT, high), None)
    return high, wanted if chosen is None else chosen.block


def estimate_plan(
    estimator: Estimator, examples: Examples, components: int, quality_rows: int, most: int
) -> tuple[int, int]:
    """Returns the bytes that an estimate takes beside the engine, and the examples of a block under the default budget.

    Raises:
      FitError: Not even one example fits into the default budget.
    """
    fixed = estimator.fixed_memory(components) + 9 * components * quality_rows
    each = estimator.memory(components) + 24 * quality_rows + examples.bytes_per_example
    fits = (DEFAULT - fixed) // each if fixed < DEFAULT else 0
    if fits < 1:
        raise FitError(
            f"An estimate of {components:,} components needs at least {fixed + each:,} bytes of memory, and its "
            f"default budget is {DEFAULT:,}. Give it more: memory= (`--memory-gib`)."
        )
    block = min(most, len(examples), fits)
    return fixed + block * each, int(block)


def engine_peak(engine: Engine, memory: MemoryPlan, examples: Examples, gradients: bool) -> int:
    """Returns the bytes at the peak of the engine's calls on these examples, inputs included, on its device."""
    held = min(len(examples), inputs_held(engine, max(1, memory.input_each)))
    return memory.peak(held, gradients)


def inputs_held(engine: Engine, each: int) -> int:
    """Returns how many inputs of so many bytes the engine holds at a time."""
    room = torch.cuda.mem_get_info(engine.device)[0] // 2 if engine.device.type == "cuda" else HOST_BUDGET
    return int(room // each)


def with_held_out(fitted: float) -> float:
    """Returns the rows of a campaign of which so many are fitted."""
    return fitted * HELD_OUT / (HELD_OUT - 1)
