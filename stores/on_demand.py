"""Faces of packages whose names are loaded when they are asked for: `import ablate` costs milliseconds, not seconds."""

from __future__ import annotations

import ast
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Face = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def on_demand(namespace: dict[str, Any]) -> Face:
    """Returns `__getattr__`, `__dir__` and `__all__` of a package, for its `__init__` to have (PEP 562).

    A name is loaded from where the file imports it for type checkers (`if TYPE_CHECKING: from a.b import C as C`),
    which is read here: so there is one list. Folders and files of the package are loaded by their names, too.

    Args:
      namespace: The package's `globals()`; what was asked for once is found there.
    """
    package = namespace["__name__"]
    homes = _homes(Path(namespace["__file__"]))

    def load(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(homes[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            near = get_close_matches(name, homes, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}.{hint}")
        namespace[name] = value
        return value

    return load, lambda: sorted({*namespace, *homes} - {"TYPE_CHECKING"}), sorted(homes)


def _homes(file: Path) -> dict[str, str]:
    """Returns, per name that a file imports as itself for type checkers, the module it comes from."""
    found: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imports = [line for line in node.body if isinstance(line, ast.ImportFrom)]
            found |= {alias.name: str(line.module) for line in imports for alias in line.names}
    return found
