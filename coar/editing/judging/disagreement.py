"""Finding failures nobody has labelled yet: images on which two models disagree most, to be looked at by people.

Source: the benchmark of Yang et al. (arXiv 2411.01948), Section 4.1, by maximum discrepancy (MAD); distance and filters
as in the code of MAD (Wang et al.), as the paper does not state them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coar.errors import EditError

Path = Sequence[str]  # from the root of a hierarchy (e.g. "entity") down to a class

LEAST = 0.8
PER_CLASS = 3


def hop_distance(first: Sequence[Path], second: Sequence[Path], weighted: bool = True) -> float:
    """Returns how far apart two classes are in a hierarchy: the cost of the nodes their paths do not share.

    Args:
      first, second: All paths from the root to each class; the least distance over all pairs counts.
      weighted: A node at depth i (the root has 0) costs 2^(1 - i), so that differences near the root weigh more; else
        1.
    """
    if not first or not second or not all((*first, *second)):
        raise EditError("A class has no path from the root. Give at least one path of at least one node for each.")
    return min(_path_distance(a, b, weighted) for a in first for b in second)


def _path_distance(first: Path, second: Path, weighted: bool) -> float:
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    if not shared:
        raise EditError(f"Paths start at {first[0]!r} and {second[0]!r}, expected one root.")
    depths = [*range(shared, len(first)), *range(shared, len(second))]
    return float(sum(2.0 ** (1 - depth) if weighted else 1.0 for depth in depths))


@dataclass(frozen=True, eq=False)
class Disagreement:
    """Images on which two models disagree, the farthest apart first.

    Attributes:
      positions: Of the images.
      distances: Of the two predicted classes, in the same order.
      pairs: (images, 2): the classes that the model to be edited and the other model predict.
      protocol: How they were chosen, in words. The label of such an image is not known yet: people must look at it.
    """

    positions: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    protocol: str


def most_disagreeing(
    first: Any, second: Any, distances: Any, *, least: float = LEAST, per_class: int = PER_CLASS
) -> Disagreement:
    """Returns the images on which two models disagree most, each confident, without many of one kind. Mutates nothing.

    Args:
      first, second: Probabilities (images, classes) of the model to be edited and of the other model.
      distances: (classes, classes), e.g. of `hop_distance`.
      least: Both models' top probability must be at least this.
      per_class: How many images may be kept that the first model predicts as one class. Of each pair of classes one is.

    Ties: the lower position first.
    """
    p, q, far = (np.asarray(values, dtype=np.float64) for values in (first, second, distances))
    if p.ndim != 2 or p.shape != q.shape or far.shape != (p.shape[1],) * 2:
        raise EditError(
            f"Probabilities have shapes {p.shape} and {q.shape} and distances {far.shape}, expected (images, classes) "
            "twice and (classes, classes)."
        )
    for name, values in (("first", p), ("second", q)):
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise EditError(f"The {name} model's probabilities are not all between 0 and 1. Are these logits?")
    pairs = np.stack([p.argmax(axis=1), q.argmax(axis=1)], axis=1)
    apart = far[pairs[:, 0], pairs[:, 1]]
    sure = (p.max(axis=1, initial=0) >= least) & (q.max(axis=1, initial=0) >= least) & (pairs[:, 0] != pairs[:, 1])
    kept: list[int] = []
    seen: set[tuple[int, int]] = set()
    per: dict[int, int] = {}
    for i in np.argsort(-apart, kind="stable"):
        pair = int(pairs[i, 0]), int(pairs[i, 1])
        if sure[i] and pair not in seen and per.get(pair[0], 0) < per_class:
            kept.append(int(i))
            seen.add(pair)
            per[pair[0]] = per.get(pair[0], 0) + 1
    positions = np.array(kept, dtype=np.int64)
    protocol = (
        f"{len(kept):,} of {len(p):,} images on which two models disagree, farthest apart first; both predict with at "
        f"least {least:g}; one image per pair of classes, at most {per_class} per class of the first model. Labels are "
        "to be given by people."
    )
    return Disagreement(positions, apart[positions], pairs[positions], protocol)
