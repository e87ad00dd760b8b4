"""Generalisation against locality: operating points of methods, the Pareto front and the area under it.

Source: Yang et al. (arXiv 2411.01948), Section 5; the area (hypervolume with respect to (0, 0)) is the toolkit's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from coar.metrics.checks import Floats, MetricError


@dataclass(frozen=True)
class OperatingPoint:
    """What one setting of a method reaches.

    Attributes:
      name: The setting, e.g. "density 0.05".
      locality: Locality rate (agreement), x.
      generalisation: Generalisation rate, y.
      success: Success rate. To be read beside the other two: an edit that does nothing has locality 1.
      method: What was set.
    """

    name: str
    locality: float
    generalisation: float
    success: float = float("nan")
    method: str = ""


@dataclass(frozen=True)
class TradeoffCurve:
    """Operating points of one or several methods, with their front.

    Attributes:
      points: All points, as given.
      front: Positions of the points nothing beats in both rates, by rising locality; equal points once, the first.
      undefined: Positions of points whose locality or generalisation is NaN; they are in no front.
      hypervolume: Area of what the front dominates within [0, locality] x [0, generalisation]; from 0 to 1.
      protocol: What was compared, in words.
    """

    points: tuple[OperatingPoint, ...]
    front: tuple[int, ...]
    undefined: tuple[int, ...]
    hypervolume: float
    protocol: str = field(repr=False)

    @classmethod
    def of(cls, points: Sequence[OperatingPoint]) -> TradeoffCurve:
        """Returns the curve through these points. Mutates nothing. Raises MetricError without points."""
        if not points:
            raise MetricError("There are no operating points. Give at least one.")
        plane = np.array([(point.locality, point.generalisation) for point in points], dtype=np.float64)
        front = pareto_front(plane)
        undefined = tuple(int(i) for i in np.flatnonzero(np.isnan(plane).any(axis=1)))
        area = hypervolume(plane)
        left_out = f" {len(undefined):,} points without a rate are left out." if undefined else ""
        protocol = (
            f"Generalisation rate (y) against locality rate (x, agreement with the unedited model), one point per "
            f"setting: {len(points):,} points, {len(front)} on the Pareto front; hypervolume {area:.4g} with respect "
            f"to (0, 0), 1 is best. Read the success rate beside it: no edit at all is at locality 1.{left_out}"
        )
        return cls(tuple(points), tuple(int(i) for i in front), undefined, area, protocol)

    def table(self) -> pd.DataFrame:
        """Returns one row per point: method, name, locality, generalisation, success, on_front."""
        return pd.DataFrame(
            {
                "method": point.method,
                "name": point.name,
                "locality": point.locality,
                "generalisation": point.generalisation,
                "success": point.success,
                "on_front": i in self.front,
            }
            for i, point in enumerate(self.points)
        )


def pareto_front(points: Any) -> npt.NDArray[np.int64]:
    """Returns the positions of the points (n, 2) that no other beats, by rising x. More is better in both.

    A point is beaten by one that is at least as good in both coordinates and better in one. Of equal points the first
    is kept. Points with NaN are in no front.
    """
    plane = _plane(points)
    order = np.lexsort((np.arange(len(plane)), -plane[:, 1], -plane[:, 0]))  # x falling, then y falling, then first
    front: list[int] = []
    best = -np.inf
    for i in order:
        if plane[i, 1] > best and not np.isnan(plane[i, 0]):  # NaN in y is never above
            front.append(int(i))
            best = plane[i, 1]
    return np.array(front[::-1], dtype=np.int64)


def hypervolume(points: Any) -> float:
    """Returns the area of the union of the rectangles from (0, 0) to each of the points (n, 2). Mutates nothing.

    Points with NaN, or with a coordinate of 0 or less, add nothing.
    """
    plane = _plane(points)
    inside = plane[(plane > 0).all(axis=1)]
    front = inside[pareto_front(inside)]
    widths = np.diff(front[:, 0], prepend=0.0)
    return float((widths * front[:, 1]).sum())


def _plane(points: Any) -> Floats:
    plane = np.asarray(points, dtype=np.float64)
    if plane.size == 0:
        plane = plane.reshape(0, 2)
    if plane.ndim != 2 or plane.shape[1] != 2:
        raise MetricError(f"Points have shape {plane.shape}, expected (n, 2): (locality, generalisation) each.")
    return plane
