"""The public face as text: `python -m tests.house.public_face > tests/house/public_face.txt` after a wanted change."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator

PACKAGES = ("ablate", "coar", "coar.metrics", "stores")


def public_face() -> str:
    """Returns one line per public name: its signature, and the first line of its docstring."""
    lines = [line for package in PACKAGES for line in _of_package(package)]
    return re.sub(r" at 0x[0-9a-f]+>", ">", "\n".join(lines)) + "\n"


def _of_package(package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    for name in sorted(name for name in dir(module) if not name.startswith("_")):
        value = getattr(module, name)
        if not inspect.ismodule(value):
            yield _line(f"{package}.{name}", value)
            if inspect.isclass(value):
                yield from _members(f"{package}.{name}", value)


def _members(path: str, kind: type) -> Iterator[str]:
    for name, value in sorted(inspect.getmembers(kind)):
        owner = next((c for c in kind.__mro__ if name in vars(c)), object)
        ours = owner.__module__.partition(".")[0] in PACKAGES
        if ours and not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
            yield _line(f"{path}.{name}", value)


def _line(path: str, value: object) -> str:
    if isinstance(value, property):
        return f"{path}  # {_summary(value)}"
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return f"{path} = {value!r}"
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):
        signature = ""
    return f"{path}{signature}  # {_summary(value)}"


def _summary(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.stdout.write(public_face())
