"""What every metric checks of the predictions it is given, and how it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from coar.errors import CoarError

Classes = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Row = dict[str, Any]  # of a table of metrics


class MetricError(CoarError, ValueError):
    """Predictions, labels or accuracies from which a metric cannot be computed."""


def as_classes(name: str, values: Any, *shape: int | None) -> Classes:
    """Returns predicted or true classes as int64 of a shape; None: any length. Mutates nothing.

    Raises:
      MetricError: No integers, another shape, or a negative number.
    """
    found = np.asarray(values)
    if found.size == 0 and not np.issubdtype(found.dtype, np.integer):
        found = found.astype(np.int64)  # an empty list is float64
    expected = f"({', '.join('n' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
    fits = len(found.shape) == len(shape) and all(s in (None, f) for s, f in zip(shape, found.shape, strict=True))
    if not np.issubdtype(found.dtype, np.integer) or not fits:
        raise MetricError(
            f"{name} are {found.dtype} of shape {found.shape}, expected integers of shape {expected}: one class number "
            "each."
        )
    if found.size and int(found.min()) < 0:
        raise MetricError(f"{name} hold {int(found.min())}, expected class numbers from 0 up. Leave such examples out.")
    return found.astype(np.int64)


def as_bits(name: str, values: Any, *shape: int | None) -> Bits:
    """Returns a boolean array of a shape; None: any length. Mutates nothing. Raises MetricError for anything else."""
    found = np.asarray(values)
    expected = f"({', '.join('n' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
    fits = len(found.shape) == len(shape) and all(s in (None, f) for s, f in zip(shape, found.shape, strict=True))
    if found.dtype != np.bool_ or not fits:
        raise MetricError(f"{name} are {found.dtype} of shape {found.shape}, expected bool of shape {expected}.")
    return found


def as_accuracies(name: str, values: Any) -> Floats:
    """Returns numbers (n,) between 0 and 1 as float64. Mutates nothing. Raises MetricError for anything else."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise MetricError(f"{name} have shape {found.shape}, expected (n,): one accuracy per model.")
    wrong = np.flatnonzero(~((found >= 0) & (found <= 1)))  # NaN, too
    if len(wrong):
        raise MetricError(
            f"{name} hold {found[wrong[0]]:g} at position {wrong[0]}, expected accuracies between 0 and 1, not percent."
        )
    return found


def share(count: int, total: int) -> float:
    """Returns count / total; NaN where there is nothing to count."""
    return count / total if total else float("nan")


def metric_row(name: str, value: float, count: int, total: int, interval: tuple[float, float], protocol: str) -> Row:
    """Returns a row for a table of metrics: metric, value, low, high, count, of, protocol."""
    low, high = interval
    return {
        "metric": name,
        "value": value,
        "low": low,
        "high": high,
        "count": count,
        "of": total,
        "protocol": protocol,
    }
