"""Comparing two estimates of the same attributions: where they agree, and where errors cannot explain a difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate.campaign.identity import compared
from coar.attributions.attributions import Attributions
from coar.errors import QueryError
from coar.judging.calibration import standardised
from coar.statistics import correlation, mean_interval, rank_correlation
from stores import Difference

TOP = 20
BEYOND = 2.0  # combined standard errors: a difference that chance makes in one of 22 components
MEASURES = ("pearson", "spearman", "cosine", "overlap", "rms", "beyond")

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two attribution stores beside each other, on the examples that both have. Differences are a minus b.

    Attributes:
      a, b: Where the stores are.
      sizes: How many examples each has.
      k: Of the overlap.
      examples: One row per common example: id; example_a and example_b (its positions); pearson and spearman (of its
        two weight vectors; NaN where one is constant); cosine (0 where one is all zero); overlap (share of the k
        strongest components of a, by absolute weight, that are among the k strongest of b); rms (of the differences, in
        units of the output); beyond (share of components that differ by more than 2 combined standard errors).
      differences: What differs in how the two were estimated and from what, e.g. method, ridge, model, output, plan.
    """

    a: str
    b: str
    sizes: tuple[int, int]
    k: int
    examples: pd.DataFrame
    differences: tuple[Difference, ...]
    _components: pd.DataFrame

    def __repr__(self) -> str:
        mean = self.examples[list(MEASURES)].mean()
        return (
            f"<Comparison: {len(self.examples):,} common examples of {self.sizes[0]:,} and {self.sizes[1]:,}, "
            f"{len(self._components):,} components: mean correlation {mean['pearson']:.3f}, top-{self.k} overlap "
            f"{mean['overlap']:.0%}, {mean['beyond']:.1%} differ by more than {BEYOND:g} combined standard errors>"
        )

    def summary(self) -> pd.DataFrame:
        """Returns one row per measure: mean over examples with its 95 % bootstrap interval, median, examples."""
        rows = []
        for name in MEASURES:
            values = self.examples[name].to_numpy(dtype=np.float64)
            known = values[np.isfinite(values)]
            mean, median = (known.mean(), np.median(known)) if len(known) else (np.nan, np.nan)
            low, high = mean_interval(known)
            rows.append({"measure": name, "mean": mean, "low": low, "high": high, "median": median})
            rows[-1]["examples"] = len(known)
        return pd.DataFrame(rows)

    def components(self) -> pd.DataFrame:
        """Returns one row per component, over the common examples.

        Returns:
          Columns component, name, module, layer, difference (mean), rms (of the differences), z (the mean difference in
          its standard errors). The latter takes errors as independent between examples and between the two stores;
          those of a regression are not, as all its examples see the same keep-vectors: there, z is too large.
        """
        return self._components.copy()


def compare(a: Attributions, b: Attributions, *, k: int | None = None) -> Comparison:
    """Returns how two attribution stores agree, example by example and component by component. Mutates nothing.

    Examples are matched by id; those that only one store has are left out. Combined standard errors are those of two
    independent estimates: two that share random numbers differ by less.

    Args:
      a, b: Attributions of the same component index.
      k: How many strongest components the overlap looks at; None: 20, or all if there are fewer.

    Cost: reads weights and standard errors of the common examples once, block by block, and sorts each example's.

    Raises:
      QueryError: Another index, no common example, an example with another label, or a k that is no number of
        components.
    """
    _check_index(a, b)
    if a.in_output_units != b.in_output_units:
        for one in (a, b):
            one.require_output_units("A comparison with attributions in units of the output")
    count = len(a.index)
    k = min(TOP, count) if k is None else k
    if not 1 <= k <= count:
        raise QueryError(f"k is {k}, expected 1 to {count}: there are {count} components.")
    matched = _matched(a, b)
    matched = matched[~(matched["example_a"].isin(a.lacking) | matched["example_b"].isin(b.lacking))]
    parts, sums = [], np.zeros((3, count))
    step = max(a.store.block_examples, b.store.block_examples)
    for start in range(0, len(matched), step):
        at_a, at_b = (matched[name].to_numpy()[start : start + step] for name in ("example_a", "example_b"))
        mine, other, errors, others = a.weights[at_a], b.weights[at_b], a.stderr[at_a], b.stderr[at_b]
        parts.append(_per_example(mine, other, standardised(mine, errors, other, others), k))
        difference = mine.astype(np.float64) - other
        variance = errors.astype(np.float64) ** 2 + others.astype(np.float64) ** 2
        sums += [difference.sum(axis=0), (difference**2).sum(axis=0), variance.sum(axis=0)]
    measures = pd.concat(parts, ignore_index=True)
    return Comparison(
        a.store.where,
        b.store.where,
        (len(a), len(b)),
        k,
        pd.concat([matched, measures], axis=1),
        tuple(compared(a.header["identity"], b.header["identity"])),
        _per_component(a, sums, len(matched)),
    )


def _per_example(mine: Weights, other: Weights, z: npt.NDArray[np.float64], k: int) -> pd.DataFrame:
    """Returns the measures of a block of examples; all arrays are (examples, components)."""
    x, y = mine.astype(np.float64), other.astype(np.float64)
    length = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return pd.DataFrame(
        {
            "pearson": correlation(x.T, y.T),
            "spearman": rank_correlation(x.T, y.T),
            "cosine": (x * y).sum(axis=1) / np.where(length > 0, length, 1.0),
            "overlap": (strongest(mine, k) & strongest(other, k)).sum(axis=1) / k,
            "rms": np.sqrt(((x - y) ** 2).mean(axis=1)),
            "beyond": (np.abs(z) > BEYOND).mean(axis=1),
        }
    )


def strongest(weights: Weights, k: int) -> npt.NDArray[np.bool_]:
    """Returns which k components of each example have the largest absolute weights; ties by id, as `top` has them."""
    size = np.abs(weights)
    least = np.partition(size, size.shape[1] - k, axis=1)[:, [size.shape[1] - k]]
    above, level = size > least, size == least
    wanted = k - above.sum(axis=1, keepdims=True)
    return np.asarray(above | (level & (np.cumsum(level, axis=1) <= wanted)))


def _per_component(a: Attributions, sums: npt.NDArray[np.float64], examples: int) -> pd.DataFrame:
    total, squares, variance = sums
    table = pd.DataFrame({name: a.index.columns[name] for name in ("id", "name", "module", "layer")})
    with np.errstate(divide="ignore", invalid="ignore"):
        z = total / np.sqrt(variance)
    return table.rename(columns={"id": "component"}).assign(
        difference=total / examples, rms=np.sqrt(squares / examples), z=z
    )


def _matched(a: Attributions, b: Attributions) -> pd.DataFrame:
    """Returns columns id, example_a, example_b of the common examples, in a's order."""
    mine, other = (
        x.examples[["id", "label"]].assign(**{f"example_{name}": np.arange(len(x))}) for name, x in (("a", a), ("b", b))
    )
    both = mine.merge(other, on="id", how="inner", suffixes=("", "_b"), sort=False)
    if not len(both):
        raise QueryError(
            f"{a.store.where} and {b.store.where} have no example in common: ids such as {mine['id'].iloc[0]!r} and "
            f"{other['id'].iloc[0]!r}. Give attributions of the same examples, with the same ids."
        )
    other_label = both[both["label"] != both["label_b"]]
    if len(other_label):
        row = other_label.iloc[0]
        raise QueryError(
            f"{len(other_label):,} of {len(both):,} common ids have another label, the first is {row['id']!r}: "
            f"{row['label']} in {a.store.where}, {row['label_b']} in {b.store.where}. These are other examples."
        )
    return both[["id", "example_a", "example_b"]]


def _check_index(a: Attributions, b: Attributions) -> None:
    if a.index != b.index:
        raise QueryError(
            f"{a.store.where} has index {a.index.hash[:12]} of {len(a.index):,} components, {b.store.where} index "
            f"{b.index.hash[:12]} of {len(b.index):,}. Only attributions of the same components can be compared."
        )
