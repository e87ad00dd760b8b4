"""Are the standard errors of attributions as large as the errors? Coverage of intervals against a long run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm

import stores
from coar.attributions.attributions import Attributions
from coar.errors import QueryError

LEVELS = (0.5, 0.8, 0.9, 0.95)


def calibration(
    attributions: Attributions,
    reference: Attributions,
    levels: Sequence[float] = LEVELS,
    *,
    by: Literal["layer"] | None = None,
) -> pd.DataFrame:
    """Returns how often intervals of the weights cover those of a long run, and the size of errors. Mutates nothing.

    Of each pair (example, component) `z = (weight - reference weight) / sqrt(stderr^2 + reference stderr^2)`: the
    reference's own standard error counts, too, so the long run need not be infinite. The interval of a level covers
    where |z| is at most the normal quantile; calibrated intervals of 95 % cover in 95 % of the pairs. A pair with both
    standard errors zero and equal weights (a component that reaches no output) is left out; with unequal weights it is
    covered by no interval.

    Args:
      attributions: Whose standard errors are judged.
      reference: A longer, independent run: of the same model, examples, index, output and ablate fraction, with
        another seed.
      levels: Of the intervals, between 0 and 1.
      by: None: all pairs together, one row; "layer": one row per layer.

    Returns:
      Columns: layer (if asked for); pairs (how many were judged); one per level, e.g. `95%` (the share covered); mean z
      and sd z (0 and 1 where calibrated; sd > 1: standard errors are too small); stderr zero (share of all pairs in
      which the attributions claim a standard error of zero). NaN where there is nothing to judge.

    Cost: reads weights and standard errors of both once, block by block.

    Raises:
      QueryError: The two are not about the same, or share their random numbers.
    """
    levels = tuple(levels)
    if not levels or not all(0 < level < 1 for level in levels):
        raise QueryError(f"levels are {levels}, expected numbers between 0 and 1 (exclusive), e.g. {LEVELS}.")
    if by not in (None, "layer"):
        raise QueryError(f"by is {by!r}, expected 'layer' or None.")
    _check_same(attributions, reference)
    for one in (attributions, reference):
        one.require_output_units("A calibration")
    sums = _Totals(norm.ppf((1 + np.asarray(levels)) / 2), len(attributions.index))
    step = max(attributions.store.block_examples, reference.store.block_examples)
    for start in range(0, len(attributions), step):
        part = slice(start, start + step)
        sums.add(attributions.weights[part], attributions.stderr[part], reference.weights[part], reference.stderr[part])
    names = [f"{100 * level:g}%" for level in levels]
    if by is None:
        return sums.table(np.zeros(len(attributions.index), dtype=np.int64), names)
    layer = np.asarray(attributions.index.columns["layer"])
    table = sums.table(np.unique(layer, return_inverse=True)[1], names)
    table.insert(0, "layer", np.unique(layer))
    return table


class _Totals:
    """Sums per component over examples of what the table is made of."""

    def __init__(self, quantiles: npt.NDArray[np.float64], components: int) -> None:
        self.quantiles = quantiles
        self.covered = np.zeros((len(quantiles), components), dtype=np.int64)
        self.pairs, self.finite, self.zero, self.all = (np.zeros(components, dtype=np.int64) for _ in range(4))
        self.total, self.squares = np.zeros(components), np.zeros(components)

    def add(self, weights: Any, stderr: Any, reference: Any, reference_stderr: Any) -> None:
        """Adds a block of examples; all are (examples, components) float32."""
        z = standardised(weights, stderr, reference, reference_stderr)
        judged, finite = ~np.isnan(z), np.isfinite(z)
        for level, quantile in enumerate(self.quantiles):
            self.covered[level] += (np.abs(z) <= quantile).sum(axis=0)
        known = np.where(finite, z, 0.0)
        self.total += known.sum(axis=0)
        self.squares += (known**2).sum(axis=0)
        self.pairs += judged.sum(axis=0)
        self.finite += finite.sum(axis=0)
        self.zero += (np.asarray(stderr) == 0).sum(axis=0)
        self.all += len(z)

    def table(self, group: npt.NDArray[np.int64], names: Sequence[str]) -> pd.DataFrame:
        """Returns one row per group of components, numbered from 0."""

        def over(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
            return np.asarray(np.bincount(group, weights=values), dtype=np.float64)

        pairs, finite = over(self.pairs), over(self.finite)
        columns: dict[str, Any] = {"pairs": pairs.astype(np.int64)}
        for name, covered in zip(names, self.covered, strict=True):
            columns[name] = _ratio(over(covered), pairs)
        mean = _ratio(over(self.total), finite)
        variance = _ratio(over(self.squares), finite) - mean**2
        columns |= {"mean z": mean, "sd z": np.sqrt(np.maximum(variance, 0.0))}  # rounding alone makes it negative
        return pd.DataFrame(columns | {"stderr zero": _ratio(over(self.zero), over(self.all))})


def standardised(weights: Any, stderr: Any, others: Any, others_stderr: Any) -> npt.NDArray[np.float64]:
    """Returns differences of weights in combined standard errors, as float64 of their shape.

    Where both standard errors are zero: NaN if the weights are equal, else infinite.
    """
    difference = np.asarray(weights, dtype=np.float64) - others
    combined = np.hypot(np.asarray(stderr, dtype=np.float64), others_stderr)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(difference / combined)


def _ratio(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)


def _check_same(attributions: Attributions, reference: Attributions) -> None:
    """Raises QueryError unless a reference estimates the same weights from random numbers of its own."""
    mine, other = attributions.header["identity"], reference.header["identity"]
    names = ("index", "data", "model", "output")
    expected, got = (
        {**{name: of[name] for name in names}, "ablate_fraction": of["plan"]["ablate_fraction"]}
        for of in (mine["of"], other["of"])
    )
    different = stores.differences(expected, got)
    if different:
        raise QueryError(
            f"The reference {reference.store.where} is not about the same as {attributions.store.where}: "
            f"{'; '.join(map(str, different))}. Estimate both from the same model, examples, output and ablate "
            "fraction."
        )
    seed = mine["of"]["plan"]["seed"]
    if mine["method"] == other["method"] and seed == other["of"]["plan"]["seed"]:
        raise QueryError(
            f"Method ({mine['method']}) and seed ({seed}) of both are the same: they share random numbers, and their "
            "difference is smaller than their errors. Estimate the reference with another seed."
        )
