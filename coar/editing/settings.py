"""Settings of the wrong type, named before they are compared with anything."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from typing import Any

_TYPES: dict[str, tuple[type, str]] = {
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "text"),
}


def wrong_types(settings: Any) -> list[str]:
    """Returns which fields of a dataclass are not of their simple type (int, float, bool, str, or None), in words.

    The annotations must be text (`from __future__ import annotations`); fields of other types are not looked at.
    """
    problems = []
    for field in fields(settings):
        names = str(field.type).split(" | ")
        value = getattr(settings, field.name)
        if not {*names} <= {*_TYPES, "None"} or ("None" in names and value is None):
            continue
        simple = [_TYPES[name] for name in names if name != "None"]
        fits = any(isinstance(value, kind) and (kind is bool) >= isinstance(value, bool) for kind, _ in simple)
        if not fits:
            expected = " or ".join([words for _, words in simple] + ["None"] * ("None" in names))
            problems.append(f"{field.name} is {value!r}, expected {expected}")
    return problems
