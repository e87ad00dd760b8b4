"""Regression: one ridge-regularised linear attribution per example from the finished blocks of a campaign.

Streaming and exact: sums over keep-vectors once, then slab by slab of examples, in a stated memory budget.
Source: COAR (arXiv 2404.11534), Section 3, with ridge solved in closed form instead of by stochastic descent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from zarr.storage import MemoryStore

from ablate.progress import progress_bar
from coar.attributions import Attributions
from coar.errors import FitError
from coar.estimators.normal import GramSums, Matrix, OutputSums, Spectrum, choose_ridge, solve
from coar.estimators.storing import open_same, remove
from coar.evaluate import correlation, explained_share
from stores import AttributionStore, CampaignStore
from stores.schema import Location

# Penalties that are tried, in units of the mean eigenvalue of the centred Gram matrix.
RIDGE_GRID: Matrix = np.logspace(-4, 3, 22)
LEAST_ROWS = 20
BLOCK_EXAMPLES = 256


def fit(
    campaign: CampaignStore | str | os.PathLike[str],
    store: Location | None = None,
    *,
    ridge: float | None = None,
    memory: int = 2 * 2**30,
    overwrite: bool = False,
    progress: bool = False,
) -> Attributions:
    """Returns one linear attribution per example, fitted to the finished rows of a campaign. The campaign is unchanged.

    Of the finished rows, every tenth is held out and never fitted: quality is measured there. Without `ridge`, another
    tenth is first used to choose a penalty per example from a grid, then fitted with the rest.

    Args:
      campaign: A campaign store or its path. Unfinished blocks are not used.
      store: Where to write the attributions; None: in memory. A finished store of the same fit is returned as it is,
        an unfinished one is finished.
      ridge: One penalty for all examples, added to the diagonal of the centred Gram matrix (scikit-learn's `alpha`);
        0 is ordinary least squares. None: chosen per example.
      memory: Budget in bytes, for everything at once (with the result, if that is kept in memory).
      overwrite: Replace an attribution store of another fit.
      progress: Show a progress bar on stderr.

    Returns:
      Attributions: weights and standard errors (examples, components) and bias (examples,) in units of the output;
      quality per example.

    Cost: no forward passes; rows x components x (components + examples) multiplications, one or two
      eigendecompositions (components^3).

    Raises:
      FitError: Too few rows, a budget too small (says what is needed), or ridge=0 where no solution is unique. What
        was at `store` is then still there.
      stores.StoreMismatchError: There is another fit at `store`.
    """
    # opened for reading: what is finished now, and nothing that a running campaign adds meanwhile
    campaign = CampaignStore.open(campaign.location if isinstance(campaign, CampaignStore) else campaign)
    if ridge is not None and not (np.isfinite(ridge) and ridge >= 0):
        raise FitError(f"ridge is {ridge}, expected a finite number >= 0, or None to choose one per example.")
    finished = _Finished.now(campaign)
    place = store if store is not None else MemoryStore()
    identity = {
        "method": "regression",
        "campaign": finished.fingerprint,
        "rows": len(finished.rows),
        "ridge": "chosen per example" if ridge is None else float(ridge),
        "of": {key: campaign.header["identity"][key] for key in ("model", "data", "index", "plan", "output")},
    }
    target = open_same(place, identity, overwrite)
    if target is None or target.missing_blocks():
        block = target.block_examples if target is not None else None
        plan = _MemoryPlan.make(campaign, len(finished.rows), memory, ridge is None, store is None, block)
        design = _read_design(campaign, finished.blocks, ridge)
        if target is None:  # only now: what cannot be fitted leaves nothing behind, and what is there alone
            if overwrite:
                remove(place)
            target = AttributionStore.create(
                place,
                header={
                    "identity": identity,
                    **{key: campaign.header[key] for key in ("spec", "loadable", "index", "environments")},
                },
                components=campaign.components,
                examples=campaign.examples,
                block_examples=plan.block,
            )
        _fit_missing(campaign, target, plan, design, finished.blocks, progress)
    return Attributions(AttributionStore.open(place))


@dataclass(frozen=True)
class _Finished:
    """What of a campaign was finished when it was opened: it may be running, what it finishes later is not used."""

    blocks: list[int]
    rows: npt.NDArray[np.int64]
    fingerprint: str

    @classmethod
    def now(cls, campaign: CampaignStore) -> _Finished:
        """Returns the finished blocks, or raises FitError if they are too few to fit, choose and measure with."""
        rows = campaign.finished_rows
        if len(rows) < LEAST_ROWS or len(set(rows % 10) & {8, 9}) < 2:
            lacking = "" if len(rows) < LEAST_ROWS else ", none of them numbered ...8 or none ...9"
            raise FitError(
                f"{campaign.where} has {len(rows)} finished rows{lacking}; a fit needs at least {LEAST_ROWS} (and as a "
                "rule several times as many as there are components). Run more of the campaign first."
            )
        return cls(campaign.finished_blocks(), rows, campaign.fingerprint)


@dataclass(frozen=True)
class _Roles:
    """Which rows of a block are fitted, which choose the penalty (and are fitted after), which measure quality."""

    fit: npt.NDArray[np.bool_]
    choice: npt.NDArray[np.bool_]
    test: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, span: slice, choose: bool) -> _Roles:
        """Returns the roles of a run of plan rows: they depend on the row's number alone."""
        digit = np.arange(span.start, span.stop) % 10
        choice = (digit == 8) & choose
        return cls(fit=(digit != 9) & ~choice, choice=choice, test=digit == 9)


@dataclass(frozen=True)
class _MemoryPlan:
    """How many examples are fitted at a time so that everything stays inside the budget."""

    slab: int
    block: int

    @classmethod
    def make(
        cls, campaign: CampaignStore, finished: int, memory: int, choose: bool, keep_result: bool, block: int | None
    ) -> _MemoryPlan:
        """Returns the plan for so many finished rows; `block` is given for a store that was begun: its block size."""
        components, examples, rows = campaign.component_count, campaign.example_count, campaign.block_rows
        held_out = finished // 10 + 1
        grid = len(RIDGE_GRID) if choose else 1
        fixed = 8 * (
            7 * components**2  # two Gram sums, their eigenvectors, work space of eigh
            + (4 if choose else 2) * held_out * components  # held-out keep-vectors, as they are and rotated
            + 3 * rows * components  # one block of keep-vectors
            + 4 * grid * components
        )
        fixed += 3 * rows * examples * 4 + 32 * 2**20  # one checked block as stored; libraries' own buffers
        if keep_result:
            fixed += 3 * 4 * components * examples
        each = 8 * (8 * components + 5 * held_out + 3 * rows + 4 * grid)
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


@dataclass(frozen=True)
class _Design:
    """Everything about the keep-vectors: decompositions, and the held-out rows in memory."""

    fit: Spectrum
    choose: Spectrum | None
    test: Matrix
    choice: Matrix
    ridges: Matrix
    variances: Matrix


def _fit_missing(
    campaign: CampaignStore,
    target: AttributionStore,
    plan: _MemoryPlan,
    design: _Design,
    finished: Sequence[int],
    progress: bool,
) -> None:
    missing = set(target.missing_blocks())
    done = campaign.example_count if not missing else 0
    with progress_bar("fit", campaign.example_count, done, "example", progress) as bar:
        for start in range(0, campaign.example_count, plan.slab):
            examples = slice(start, min(start + plan.slab, campaign.example_count))
            blocks = [b for b in target.blocks_of(examples) if b in missing]
            if blocks:
                values = _fit_slab(campaign, finished, design, examples)
                for b in blocks:
                    span = target.span(b)
                    part = slice(span.start - start, span.stop - start)
                    target.write_block(b, {name: value[part] for name, value in values.items()})
            bar.update(examples.stop - examples.start)


def _read_design(campaign: CampaignStore, finished: Sequence[int], ridge: float | None) -> _Design:
    sums, extra = GramSums(campaign.component_count), GramSums(campaign.component_count)
    test, choice = [], []
    for block in finished:
        keep, _ = campaign.read_block(block)  # checked against its sha256, once
        roles = _Roles.of(campaign.span(block), choose=ridge is None)
        sums.add(keep[roles.fit].astype(np.float64))
        extra.add(keep[roles.choice].astype(np.float64))
        test.append(keep[roles.test])
        choice.append(keep[roles.choice])
    chooser = Spectrum.of(sums) if ridge is None else None
    sums.merge(extra)
    del extra
    spectrum = Spectrum.of(sums)
    del sums
    if not spectrum.values.any():
        raise FitError(
            f"The {spectrum.rows} rows to fit all have the same keep-vector: there is no effect of ablating to see. "
            "Run more rows, or a campaign with a larger ablate_fraction."
        )
    if ridge == 0 and spectrum.deficient:
        raise FitError(
            f"ridge=0 has no unique solution: {spectrum.rows} rows for {campaign.component_count} components, or a "
            "component that was never ablated. Run more rows, or give ridge > 0 (or None)."
        )
    ridges = RIDGE_GRID * spectrum.scale if ridge is None else np.array([float(ridge)])
    return _Design(
        fit=spectrum,
        choose=chooser,
        test=np.concatenate(test).astype(np.float64),
        choice=np.concatenate(choice).astype(np.float64),
        ridges=ridges,
        variances=spectrum.variances(ridges),
    )


def _fit_slab(
    campaign: CampaignStore, finished: Sequence[int], design: _Design, examples: slice
) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the arrays of an attribution store for one slab of examples."""
    shift = campaign.read_outputs(finished[0], examples)[0].astype(np.float64)
    sums = OutputSums(campaign.component_count, shift)
    extra = OutputSums(campaign.component_count, shift)
    test, choice = [], []
    for block in finished:
        K = campaign.read_keep(block).astype(np.float64)
        Y = campaign.read_outputs(block, examples).astype(np.float64)
        roles = _Roles.of(campaign.span(block), choose=design.choose is not None)
        sums.add(K[roles.fit], Y[roles.fit])
        extra.add(K[roles.choice], Y[roles.choice])
        test.append(Y[roles.test])
        choice.append(Y[roles.choice])
    chosen = np.zeros(len(shift), dtype=np.intp)
    if design.choose is not None:
        chosen = choose_ridge(design.choose, design.ridges, sums, design.choice, np.concatenate(choice))
        sums.merge(extra)
    solution = solve(design.fit, design.ridges, design.variances, chosen, sums)
    observed = np.concatenate(test)
    predicted = design.test @ solution.weights + solution.bias
    values = {
        "weights": solution.weights.T,
        "stderr": solution.stderr.T,
        "bias": solution.bias,
        "quality/correlation": correlation(predicted, observed),
        "quality/r2": explained_share(predicted, observed),
        "quality/ridge": design.ridges[chosen],
        "quality/residual_sd": solution.residual_sd,
    }
    return {name: value.astype(np.float32) for name, value in values.items()}
