"""Values that never change once they are made: what has a hash must keep it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy.typing as npt

from ablate.errors import ImmutableError

K = TypeVar("K")
V = TypeVar("V")


class Immutable:
    """Attributes are set in `__init__` and never after; what is computed when first asked for is kept as usual."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = _closing(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if "_closed" in vars(self) or name in vars(self) or hasattr(type(self), name):
            raise ImmutableError(type(self).__name__, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise ImmutableError(type(self).__name__, name)


def _closing(init: Callable[..., None]) -> Callable[..., None]:
    """Returns an `__init__` after which nothing is assigned, unless it is called by a subclass's, which goes on."""

    @functools.wraps(init)
    def run(self: Immutable, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is run:
            vars(self)["_closed"] = True

    return run


class FrozenDict(dict[K, V]):
    """A dict that refuses changes. Equal to a plain one with the same content; JSON, pickle and copies know it."""

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("This mapping belongs to an immutable value and cannot be changed. Change a copy: dict(it).")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the array, which nobody can write to from now on."""
    array.setflags(write=False)
    return array
