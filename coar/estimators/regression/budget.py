"""How many examples are fitted at a time, so that a fit stays inside its memory budget."""

from __future__ import annotations

from dataclasses import dataclass

from coar.errors import FitError
from coar.estimators.regression.packed import ROWS_AT_ONCE
from coar.estimators.regression.ridge import ROWS_IN_CACHE
from coar.estimators.regression.rows import CHOOSE, FIT, TEST, CampaignRows

BLOCK_EXAMPLES = 256
LIBRARIES = 32 * 2**20  # buffers of zarr, BLAS and numba


@dataclass(frozen=True)
class FitMemory:
    """`slab` examples are fitted at a time; `block` examples make one block of the store."""

    slab: int
    block: int

    @classmethod
    def make(
        cls, rows: CampaignRows, method: str, penalties: int, memory: int, keep_result: bool, block: int | None
    ) -> FitMemory:
        """Returns the plan for a budget in bytes; `block` is given for a store that was begun: its block size.

        Raises:
          FitError: The budget is too small; says what is needed.
        """
        campaign = rows.campaign
        components, examples = campaign.component_count, campaign.example_count
        fitted, test = rows.count(FIT) + rows.count(CHOOSE), rows.count(TEST)
        fixed, each = (_lasso if method == "lasso" else _ridge)(fitted, components, penalties)
        fixed += 4 * (fitted + test) * components // 8 + 4 * 8 * ROWS_AT_ONCE * components
        fixed += 3 * campaign.block_rows * (4 * examples + components) + LIBRARIES  # one checked block as stored
        if keep_result:
            fixed += 3 * 4 * components * examples
        each += 8 * (4 * test + 3 * campaign.block_rows + 6 * components)
        slab = int((memory - fixed) // each) if memory > fixed else 0
        least = 1 if block is None else block
        if slab < least:
            raise FitError(
                f"memory={memory:,} bytes is too small to fit {components:,} components: at least "
                f"{fixed + least * each:,} are needed, {fixed + max(64, least) * each:,} or more are comfortable."
                + (" Pass store=PATH so that the result need not be kept in memory." if keep_result else "")
            )
        if block is None:
            block = min(BLOCK_EXAMPLES, slab, examples)
        return cls(slab=slab // block * block, block=block)


def _ridge(fitted: int, components: int, penalties: int) -> tuple[int, int]:
    """Returns the bytes of the decomposition with all its penalties, and of one example."""
    size = min(fitted, components)
    fixed = 8 * (4 * size**2 + 2 * components * penalties)
    each = 8 * (3 * fitted + 6 * size + 4 * components)
    if penalties > 1:  # leave-one-out
        fixed += 8 * 2 * fitted * penalties
        slab, cached = min(fitted, ROWS_AT_ONCE), min(fitted, ROWS_IN_CACHE)
        # common columns: all in float32, or three quarters as many as penalties in float64
        each += 6 * penalties * (size + slab) + 8 * penalties * (2 * cached + 8)
    return fixed, each


def _lasso(fitted: int, components: int, _: int) -> tuple[int, int]:
    """Returns the bytes of the Gram matrices and of the largest active set, and of one example."""
    most = min(fitted, components)
    return 8 * (4 * components**2 + 4 * most**2 + 2 * most * components), 8 * (3 * fitted + 10 * components)
