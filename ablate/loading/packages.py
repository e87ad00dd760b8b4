"""Heavy packages, imported when used; a missing one is named with the command that installs it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ablate.errors import LoadError


def require(package: str, extra: str = "") -> Any:
    """Returns the imported package; `extra` names this project's extra that installs it (none: it comes with us).

    Raises:
      LoadError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LoadError(
            f"This needs {package}, which is not installed ({error}). "
            f"Install it: pip install 'component-attribution{f'[{extra}]' if extra else ''}'"
        ) from error


@contextmanager
def untouched_logging() -> Iterator[None]:
    """Keeps the root logger as it was around packages that log through it, which would give it a handler."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def one_line(error: Exception) -> str:
    """Returns an error's first line without a full stop, to put into our own sentence."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
