"""What users give, in the forms they have it: examples as pairs, positions as tensors; made one form, or named."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ablate import Examples
from ablate.errors import DataError
from coar.errors import EditError

ExamplesLike = Examples | tuple[Any, ...] | Dataset[Any]  # Examples, (inputs, targets), or a data set of such items

HOW = "expected ablate.Examples, a pair (inputs, targets), or a data set of (input, target)"
PARTS = 4  # of examples: inputs, targets, ids, groups


def as_examples(value: Any, what: str) -> Examples:
    """Returns examples given as Examples, (inputs, targets) or a data set. Mutates nothing.

    Raises:
      EditError: Anything else, named as `what`.
    """
    fits = not isinstance(value, (Mapping, str)) and not (isinstance(value, tuple) and len(value) > PARTS)
    try:
        if fits:
            return Examples.of(value)
        reason = ""
    except DataError as error:
        reason = f" {error}"
    raise EditError(f"{what} is a {type(value).__name__}, {HOW}.{reason}")


def named_sets(value: Any, what: str) -> dict[str, Examples]:
    """Returns examples by name, each in any form of `as_examples`. Mutates nothing.

    Raises:
      EditError: No mapping, or a value that is no examples.
    """
    if not isinstance(value, Mapping):
        raise EditError(f"{what} is a {type(value).__name__}, expected examples by name: {{'name': examples}}.")
    return {name: as_examples(examples, f"{what}[{name!r}]") for name, examples in value.items()}


def as_positions(value: Any, what: str, count: int | None = None) -> tuple[int, ...]:
    """Returns positions of examples, given as integers, an array or a tensor of them. Mutates nothing.

    Args:
      value: The positions.
      what: Whose they are, for errors.
      count: How many examples there are; None: not known yet.

    Raises:
      EditError: None, something else than positions, one that is not there, or one twice.
    """
    listed = _listed(value, what)
    if not listed:
        raise EditError(f"The {what} set is empty: give the positions of at least one example.")
    positions = []
    for item in listed:
        if isinstance(item, (bool, np.bool_)) or not hasattr(item, "__index__"):
            raise _no_position(what, item)
        try:
            positions.append(operator.index(item))
        except TypeError:
            raise _no_position(what, item) from None
    outside = [p for p in positions if p < 0 or (count is not None and p >= count)]
    if outside:
        if count is None:
            raise EditError(f"The {what} set holds {outside[0]}: positions count from 0.")
        raise EditError(f"The {what} set has no example {outside[0]}: positions are 0 to {count - 1}.")
    if len(set(positions)) != len(positions):
        raise EditError(f"The {what} set names an example twice.")
    return tuple(positions)


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim != 1:
            raise EditError(f"The {what} set has shape {tuple(value.shape)}, expected positions: one axis of integers.")
        return value.tolist() if isinstance(value, Tensor) else list(value)
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise _no_position(what, value)
    return [item.item() if isinstance(item, Tensor) and item.ndim == 0 else item for item in value]


def _no_position(what: str, item: Any) -> EditError:
    return EditError(
        f"The {what} set holds {item!r}, expected positions: integers. For a mask, pass numpy.flatnonzero(mask); for "
        "ids, attributions.locate(ids)."
    )
