"""What an immutable value holds: mappings that refuse changes, and strengths that are plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsFloat, TypeVar

import numpy as np
import torch
from torch import Tensor

from ablate.immutable import FrozenDict
from coar.errors import EditError

K = TypeVar("K")
V = TypeVar("V")


def frozen(values: Mapping[K, V]) -> FrozenDict[K, V]:
    """Returns a copy of a mapping, and of the mappings in it, that cannot be changed."""
    return FrozenDict({key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    return frozen(value) if isinstance(value, Mapping) else value


def plain_number(name: str, value: Any) -> float:
    """Returns a number as a float: of Python, of numpy, or a tensor that holds one.

    Raises:
      EditError: Something else; True and False are no strengths.
    """
    value = value.detach() if isinstance(value, Tensor) else value
    boolean = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
    try:
        if isinstance(value, SupportsFloat) and not boolean and getattr(value, "shape", ()) == ():
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # text or a complex number in an array or a tensor
        pass
    raise EditError(f"{name} is {value!r}, a {type(value).__name__}; expected a number, e.g. 0.5.")
