"""The descent of methods that take its common settings only: no penalty, no clipping, no special first step."""

from __future__ import annotations

from typing import Any

from coar.editing.training.descent import Descent

_COMMON = ("optimizer", "rate", "steps", "momentum", "weight_decay")


def plain_descent(settings: Any) -> Descent:
    """Returns the descent with the common settings, from the fields of a method."""
    return Descent(**{name: getattr(settings, name) for name in _COMMON})
