"""Values whose attributes are set while they are made and never after: what has a hash must keep it."""

from __future__ import annotations

from typing import Any

from ablate.errors import ImmutableError


class Immutable:
    """Attributes can be set once, in `__init__`; what is computed when first asked for is kept as usual."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) or hasattr(type(self), name):
            raise ImmutableError(type(self).__name__, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise ImmutableError(type(self).__name__, name)
