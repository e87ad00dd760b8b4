"""How far a long call is, told while it runs: the loops over batches count forwards, whoever shows progress listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int], None]

BACKWARD = 2  # what a backward through gates costs, in forwards

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def ran(forwards: int) -> None:
    """Tells the listener, if there is one, that so many examples went forward through the model. Changes nothing."""
    listener = _listener.get()
    if listener is not None:
        listener(forwards)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """While entered, everything that this thread runs through a model is told to a listener; None: to nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
