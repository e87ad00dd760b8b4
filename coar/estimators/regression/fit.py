"""Regression: one linear attribution per example from the finished rows of a campaign, by ridge, OLS or lasso.

Streaming and exact: the keep-vectors are decomposed once, then slab by slab of examples, in a stated memory budget.
Source: COAR (arXiv 2404.11534), Section 3, solved exactly instead of by stochastic descent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from zarr.storage import MemoryStore

from ablate.work.progress import progress_bar
from coar.attributions.attributions import Attributions
from coar.errors import FitError
from coar.estimators.regression.arrays import Arrays, Matrix, arrays_on
from coar.estimators.regression.budget import FitMemory
from coar.estimators.regression.lasso import LassoDesign, solve_lasso
from coar.estimators.regression.packed import PackedKeep
from coar.estimators.regression.ridge import Penalties, decompose, solve
from coar.estimators.regression.rows import CHOOSE, FIT, TEST, CampaignRows, campaign_fractions
from coar.estimators.regression.spectrum import Spectrum
from coar.estimators.storing import open_same, remove
from coar.statistics import correlation, explained_share
from stores import AttributionStore, CampaignStore
from stores.format.groups import Location

Method = Literal["ridge", "ols", "lasso"]
METHODS = ("ridge", "ols", "lasso")
# What of a campaign's identity its fits keep; older campaigns do not have all of it.
SUBJECT = (
    "model",
    "weights",
    "code",
    "data",
    "index",
    "plan",
    "output",
    "output_settings",
    "ablation",
    "sample_outputs",
)
# Penalties that are tried, in units of the mean eigenvalue of the centred Gram matrix.
RIDGE_GRID: Matrix = np.logspace(-4, 3, 22)
QUALITY = {
    "ridge": ("correlation", "r2", "ridge", "residual_sd"),
    "lasso": ("correlation", "r2", "lasso", "nonzero", "residual_sd"),
}


def fit(
    campaign: CampaignStore | Location,
    store: Location | None = None,
    *,
    method: Method = "ridge",
    ridge: float | None = None,
    ablate_fraction: float | None = None,
    held_out: bool = True,
    device: str = "cpu",
    memory: int = 2 * 2**30,
    overwrite: bool = False,
    progress: bool = False,
) -> Attributions:
    """Returns one linear attribution per example, fitted to the finished rows of a campaign. The campaign is unchanged.

    Args:
      campaign: A campaign store or its path. Unfinished blocks are not used.
      store: Where to write the attributions; None: in memory. A finished store of the same fit is returned as it is,
        an unfinished one is finished.
      method: `ridge`, `ols` (ordinary least squares, the same as ridge=0) or `lasso` (sparse weights; its penalty is
        chosen per example on every tenth row, which is then fitted with the rest).
      ridge: One penalty for all examples, added to the diagonal of the centred Gram matrix (scikit-learn's `alpha`);
        0 is ordinary least squares. None: chosen per example by leave-one-out, in closed form, from a grid.
      ablate_fraction: Of a campaign with several, fit the rows of this one; None: all rows.
      held_out: Keep every tenth row out of the fit, and measure quality there. False: all rows are fitted, and
        correlation and r2 are NaN.
      device: Where the heavy products are computed: `cpu`, `cuda`, `cuda:0`, ...; the lasso's descent stays on the CPU.
      memory: Budget in bytes, for everything at once (with the result, if that is kept in memory); on a CUDA device
        it bounds the memory there, too.
      overwrite: Replace an attribution store of another fit.
      progress: Show a progress bar on stderr.

    Returns:
      Weights and standard errors (examples, components) and bias (examples,) in units of the output;
      quality per example: held-out correlation and r2, the penalty, the residual standard deviation.

      Standard errors. Ridge and OLS: residual_sd * sqrt(diagonal of (K'K + ridge)^-1). For OLS the textbook's; for
      ridge the posterior's, which counts the shrinkage as well as the noise: 95 % intervals cover about 95 % of the
      components, but fewer of the largest weights, which are shrunk the most, and fewer of all where rows are so few
      (some dozens) that the choice of the penalty is itself uncertain. Lasso: those of least squares on the
      components with weights, and for each other component that of its weight if it were added to them; 0 if it was
      never ablated. They know nothing of the selection and the shrinkage, and are too small therefore.

    Cost: no forward passes. With size = min(rows, components): rows x components x (2 size + about 6 examples)
      multiplications, one eigendecomposition (size^3); the lasso three Gram matrices and a descent per example.

    Raises:
      FitError: Too few rows, a budget too small (says what is needed), options that contradict each other, or least
        squares where no solution is unique. What was at `store` is then still there.
      stores.StoreMismatchError: There is another fit at `store`.
    """
    # opened for reading: what is finished now, and nothing that a running campaign adds meanwhile
    campaign = CampaignStore.open(campaign.location if isinstance(campaign, CampaignStore) else campaign)
    options = _Options.check(method, ridge)
    arrays = arrays_on(device)
    rows = CampaignRows.finished(campaign, ablate_fraction, held_out, choose=options.method == "lasso")
    place = store if store is not None else MemoryStore()
    identity = {
        **options.describe(),
        "campaign": campaign.fingerprint,
        "rows": len(rows),
        "held_out": held_out,
        "ablate_fraction": ablate_fraction if len(campaign_fractions(campaign)) > 1 else None,
        "of": {key: value for key, value in campaign.header["identity"].items() if key in SUBJECT},
    }
    target = open_same(place, lambda: identity, overwrite)
    if target is None or target.missing_blocks():
        block = target.block_examples if target is not None else None
        plan = FitMemory.make(rows, options.method, options.penalties, memory, store is None, block)
        solver = (_Lasso if options.method == "lasso" else _Ridge).of(rows, options.ridge, arrays)
        if target is None:  # only now: what cannot be fitted leaves nothing behind, and what is there alone
            if overwrite:
                remove(place)
            kept = {key: campaign.header[key] for key in ("spec", "loadable", "index")}
            kept["environments"] = campaign.environments  # of the outputs; that is where the rounding is
            target = AttributionStore.create(
                place,
                header={"identity": identity, **kept},
                components=campaign.components,
                examples=campaign.examples,
                block_examples=plan.block,
                quality=QUALITY["lasso" if options.method == "lasso" else "ridge"],
            )
        _fit_missing(rows, target, plan, solver, progress)
    return Attributions(AttributionStore.open(place))


@dataclass(frozen=True)
class _Options:
    """What is fitted: `ridge` is None for a penalty per example."""

    method: str
    ridge: float | None

    @classmethod
    def check(cls, method: str, ridge: float | None) -> _Options:
        """Returns the options with ridge=0 and ols as one, or raises FitError."""
        if method not in METHODS:
            raise FitError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
        if ridge is not None and method != "ridge":
            raise FitError(f"ridge={ridge} is given beside method={method!r}. Give one of the two.")
        if ridge is not None and not (np.isfinite(ridge) and ridge >= 0):
            raise FitError(f"ridge is {ridge}, expected a finite number >= 0, or None to choose one per example.")
        return cls("ols", 0.0) if method == "ols" or ridge == 0 else cls(method, ridge)

    @property
    def penalties(self) -> int:
        """How many penalties a ridge tries."""
        return len(RIDGE_GRID) if self.ridge is None else 1

    def describe(self) -> dict[str, Any]:
        """Returns the options as JSON-able values."""
        name = "lasso" if self.method == "lasso" else "ridge"
        return {"method": self.method, name: "chosen per example" if self.ridge is None else float(self.ridge)}


@dataclass(frozen=True)
class _Fitted:
    """Of one slab: weights and stderr (components, examples), bias and quality columns (examples,)."""

    weights: Matrix
    stderr: Matrix
    bias: Matrix
    quality: dict[str, Matrix]


@dataclass(frozen=True)
class _Ridge:
    """All that ridge regression needs of the keep-vectors."""

    spectrum: Spectrum
    penalties: Penalties
    test: PackedKeep

    @classmethod
    def of(cls, rows: CampaignRows, ridge: float | None, arrays: Arrays) -> _Ridge:
        """Returns what every slab needs of the keep-vectors, or raises FitError if they cannot be fitted."""
        keep = rows.keep()
        spectrum = decompose(keep[FIT], arrays)
        _refuse_no_effect(spectrum.scale, len(keep[FIT]))
        if ridge == 0 and spectrum.deficient:
            raise FitError(
                f"ridge=0 has no unique solution: {len(keep[FIT])} rows for {rows.campaign.component_count} "
                "components, or a component that was never ablated. Run more rows, or give ridge > 0 (or None)."
            )
        ridges = RIDGE_GRID * spectrum.scale if ridge is None else np.array([float(ridge)])
        return cls(spectrum, Penalties.of(spectrum, ridges), keep[TEST])

    def fit(self, outputs: dict[int, Matrix]) -> _Fitted:
        """Returns the fit of one slab; `outputs` by role, centred in place."""
        Y = outputs[FIT]
        level = Y.mean(axis=0)
        Y -= level
        arrays = self.spectrum.arrays
        found = solve(self.spectrum, self.penalties, arrays.put(Y))
        bias = level - self.spectrum.keep.mean() @ found.weights
        quality = {"ridge": found.ridge, "residual_sd": found.residual_sd}
        return _Fitted(found.weights, found.stderr, bias, quality)


@dataclass(frozen=True)
class _Lasso:
    """All that the lasso needs of the keep-vectors."""

    design: LassoDesign
    arrays: Arrays
    test: PackedKeep

    @classmethod
    def of(cls, rows: CampaignRows, _: float | None, arrays: Arrays) -> _Lasso:
        keep = rows.keep()
        design = LassoDesign.of(keep[FIT], keep[CHOOSE], arrays)
        _refuse_no_effect(float(np.trace(design.gram)), len(keep[FIT]) + len(keep[CHOOSE]))
        return cls(design, arrays, keep[TEST])

    def fit(self, outputs: dict[int, Matrix]) -> _Fitted:
        """Returns the fit of one slab; `outputs` by role."""
        tried, judging = outputs[FIT], outputs[CHOOSE]
        found = solve_lasso(self.design, tried, judging, self.arrays)
        first, second = len(tried), len(judging)
        level = (tried.sum(axis=0) + judging.sum(axis=0)) / (first + second)
        mean = (first * self.design.tried.mean() + second * self.design.judging.mean()) / (first + second)
        quality = {"lasso": found.lasso, "nonzero": found.nonzero, "residual_sd": found.residual_sd}
        return _Fitted(found.weights, found.stderr, level - mean @ found.weights, quality)


def _refuse_no_effect(spread: float, rows: int) -> None:
    if spread <= 0:
        raise FitError(
            f"The {rows} rows to fit all have the same keep-vector: there is no effect of ablating to see. "
            "Run more rows, or a campaign with a larger ablate_fraction."
        )


def _fit_missing(
    rows: CampaignRows, target: AttributionStore, plan: FitMemory, solver: _Ridge | _Lasso, progress: bool
) -> None:
    missing = set(target.missing_blocks())
    count = target.example_count
    with progress_bar("fit", count, count if not missing else 0, "example", progress) as bar:
        for start in range(0, count, plan.slab):
            examples = slice(start, min(start + plan.slab, count))
            blocks = [b for b in target.blocks_of(examples) if b in missing]
            if blocks:
                values = _fit_slab(rows, solver, examples)
                for b in blocks:
                    span = target.span(b)
                    part = slice(span.start - start, span.stop - start)
                    target.write_block(b, {name: value[part] for name, value in values.items()})
            bar.update(examples.stop - examples.start)


def _fit_slab(rows: CampaignRows, solver: _Ridge | _Lasso, examples: slice) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the arrays of an attribution store for one slab of examples."""
    outputs = rows.outputs(examples)
    found = solver.fit(outputs)
    observed = outputs[TEST]
    quality = {"correlation": np.full(observed.shape[1], np.nan), "r2": np.full(observed.shape[1], np.nan)}
    if len(observed):
        predicted = solver.test.predict(found.weights) + found.bias
        quality = {"correlation": correlation(predicted, observed), "r2": explained_share(predicted, observed)}
    values = {"weights": found.weights.T, "stderr": found.stderr.T, "bias": found.bias}
    values |= {f"quality/{name}": value for name, value in {**quality, **found.quality}.items()}
    return {name: value.astype(np.float32) for name, value in values.items()}
