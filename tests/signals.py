"""What tests do that send signals to processes they start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SENT = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@contextmanager
def default_signals() -> Iterator[None]:
    """Processes that are started within hear every signal, also when the tests run in the background.

    A shell starts background jobs with interrupts ignored, and what is ignored is handed on to children.
    """
    ignored = [number for number in SENT if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
