"""The oldest versions that `pyproject.toml` allows, as constraints for pip: what `make test-oldest` installs.

`python tests/release/lower_bounds.py > constraints.txt`. Needs Python alone: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LOWER_BOUND = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,]+\])?>=(?P<version>[\d.]+)")


def constraints(pyproject: str) -> list[str]:
    """Returns `name==version` for every dependency with a lower bound, those of extras too; the highest of several."""
    project = tomllib.loads(pyproject)["project"]
    found: dict[str, str] = {}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        if bound := LOWER_BOUND.match(requirement):
            name, version = bound["name"], bound["version"]
            found[name] = max(found.get(name, "0"), version, key=_numbers)
    return [f"{name}=={version}" for name, version in found.items()]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(PYPROJECT.read_text(encoding="utf-8")))
