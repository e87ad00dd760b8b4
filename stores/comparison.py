"""What differs between what a store is bound to and what it is used with, key by key; canonical JSON and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One key whose value in a store is not the value it is now used with."""

    key: str
    stored: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.stored)} -> {_short(self.now)}"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else text[:77] + "..."


def canonical_json(value: Any) -> str:
    """Returns `value` as JSON with sorted keys and no spaces: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """Returns the sha256 (hex) of a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differences(stored: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Returns every leaf key at which two nested mappings differ, in sorted order; a missing key counts as nothing."""
    found: list[Difference] = []
    for key in sorted({*stored, *now}):
        old, new = stored.get(key), now.get(key)
        given = [value for value in (old, new) if value is not None]
        if given and all(isinstance(value, Mapping) for value in given):
            found += differences(old or {}, new or {}, f"{prefix}{key}.")
        elif old != new:
            found.append(Difference(f"{prefix}{key}", old, new))
    return found
