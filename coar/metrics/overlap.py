"""How alike the weights or components are that a method selects for different examples.

Source: Yang et al. (arXiv 2411.01948), Figure 6: intersection over union within and between groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from coar.metrics.checks import Bits, Floats, MetricError, as_bits


@dataclass(frozen=True, eq=False)
class SelectionOverlap:
    """Intersection over union (IoU) of selections, over pairs of samples.

    Attributes:
      within: Mean IoU over pairs of different samples of one group.
      between: Mean IoU over pairs of samples of different groups.
      pairs_within, pairs_between: How many pairs these are.
      undefined: Pairs of which both selections are empty; left out.
      null: What independent random selections of the same sizes would have, mean over all pairs: p / (2 - p) at density
        p.
      constant: What one constant selection has everywhere: 1. A high IoU alone does not say that a method looks at its
        input.
      to_mean: Mean IoU of the samples' selections with one constant selection of their mean size: the
        bits selected most often. Near 1 = the input hardly matters.
      mean_selection: (bits,) bool: that constant selection, the control to edit with.
      density: Mean share of bits selected.
      matrix: Mean IoU per pair of groups; the diagonal is within a group.
      protocol: What was averaged, in words.
    """

    within: float
    between: float
    pairs_within: int
    pairs_between: int
    undefined: int
    null: float
    constant: float
    to_mean: float
    density: float
    mean_selection: Bits = field(repr=False)
    matrix: pd.DataFrame = field(repr=False)
    protocol: str = field(repr=False)


def iou(first: Any, second: Any) -> float:
    """Returns |A and B| / |A or B| of two selections (bits,) bool; NaN where both are empty. Mutates nothing."""
    a = as_bits("Bits of the first selection", first, None)
    b = as_bits("Bits of the second selection", second, len(a))
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else float("nan")


def null_iou(density: float, other: float | None = None) -> float:
    """Returns the IoU of independent random selections: p / (2 - p), or pq / (p + q - pq) for two densities.

    The ratio of expected sizes, to which the IoU of many bits converges. NaN at density 0.
    """
    p, q = density, density if other is None else other
    if not (0 <= p <= 1 and 0 <= q <= 1):
        raise MetricError(f"Densities are {p} and {q}, expected shares between 0 and 1.")
    union = p + q - p * q
    return p * q / union if union else float("nan")


def selection_overlap(selected: Any, groups: Sequence[str]) -> SelectionOverlap:
    """Returns how alike selections are within and between groups, with the null and the constant one beside it.

    Mutates nothing. Cost: samples² x bits multiplications, samples² numbers of memory.

    Args:
      selected: (samples, bits) bool: what was selected for each sample.
      groups: The group of each sample.
    """
    bits = as_bits("Selected bits", selected, None, None)
    names = np.asarray([str(group) for group in groups], dtype=object)
    if len(names) != len(bits) or len(bits) < 2 or not bits.shape[1]:
        raise MetricError(
            f"There are selections of shape {bits.shape} and {len(names)} groups, expected (samples, bits), at least 2 "
            "samples and 1 bit, and a group per sample."
        )
    table, null = _pairs(bits)
    upper = np.triu(np.ones(table.shape, dtype=np.bool_), 1)
    same = names[:, None] == names[None, :]
    defined = ~np.isnan(table)
    inside, across = upper & same & defined, upper & ~same & defined
    k = int(np.floor(bits.sum(axis=1).mean() + 0.5))
    often = np.argsort(-bits.sum(axis=0), kind="stable")[:k]  # ties: the first bits
    mean_selection = np.zeros(bits.shape[1], dtype=np.bool_)
    mean_selection[often] = True
    to_mean = np.array([iou(row, mean_selection) for row in bits])
    expected = _mean(null[upper & defined])
    density = float(bits.mean())
    n_in, n_across, undefined = int(inside.sum()), int(across.sum()), int((upper & ~defined).sum())
    protocol = (
        f"Intersection over union of selections of {len(bits):,} samples over {bits.shape[1]:,} bits at mean density "
        f"{density:.4g}: mean over {n_in:,} pairs within a group and {n_across:,} pairs between groups, each pair of "
        f"different samples once; {undefined:,} pairs of two empty selections are left out. Independent random "
        f"selections would have {expected:.4g}, one constant selection has 1."
    )
    order = sorted(set(names.tolist()))
    means = [
        [_mean(table[_block(names, a, b) & defined & ~np.eye(len(bits), dtype=np.bool_)]) for b in order] for a in order
    ]
    return SelectionOverlap(
        within=_mean(table[inside]),
        between=_mean(table[across]),
        pairs_within=n_in,
        pairs_between=n_across,
        undefined=undefined,
        null=expected,
        constant=1.0,
        to_mean=_mean(to_mean[~np.isnan(to_mean)]),
        density=density,
        mean_selection=mean_selection,
        matrix=pd.DataFrame(means, index=order, columns=order),
        protocol=protocol,
    )


def _pairs(bits: Bits) -> tuple[Floats, Floats]:
    """Returns the IoU of all pairs and what chance would give, both (samples, samples)."""
    numbers = bits.astype(np.float32)  # counts below 2**24 are exact
    both = (numbers @ numbers.T).astype(np.float64)
    sizes = bits.sum(axis=1).astype(np.float64)
    union = sizes[:, None] + sizes[None, :] - both
    p = sizes / bits.shape[1]
    chance = p[:, None] * p[None, :]
    either = p[:, None] + p[None, :] - chance
    with np.errstate(invalid="ignore"):
        return both / union, chance / either


def _block(names: Any, first: str, second: str) -> Any:
    return (names == first)[:, None] & (names == second)[None, :]


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
