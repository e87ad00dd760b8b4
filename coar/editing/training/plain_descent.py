"""The descent of methods that take its common settings only: no penalty, no clipping, no special first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from coar.editing.training.descent import Descent, descent_problems

_COMMON = ("optimizer", "rate", "steps", "momentum", "weight_decay")
_OTHERS = {"penalty": "none", "penalty_weight": 0.0, "first_step": "same", "clip": None}


def plain_problems(settings: Any) -> list[str]:
    """Returns what is wrong with the common settings of a descent, in words. Mutates nothing."""
    return descent_problems(SimpleNamespace(**_common(settings), **_OTHERS))


def plain_descent(settings: Any) -> Descent:
    """Returns the descent with the common settings, from the fields of a method."""
    return Descent(**_common(settings))


def _common(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in _COMMON}
