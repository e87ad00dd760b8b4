"""The version is in pyproject.toml alone; lower bounds are read from there, too."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version

import pytest

from ablate.campaign.identity import package_versions
from tests.release.lower_bounds import PYPROJECT, constraints

ROOT = PYPROJECT.parent
VERSION: str = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
EXAMPLE = """
[project]
dependencies = ["torch>=2.8", "moto[server]>=5.1", "exact==1.0", "any"]
[project.optional-dependencies]
one = ["ray>=2.9", "component-attribution[text]"]
two = ["ray>=2.10  # of the two, the higher"]
"""


def test_the_installed_version_is_that_of_pyproject() -> None:
    assert version("component-attribution") == VERSION
    assert package_versions()["component-attribution"] == VERSION


@pytest.mark.parametrize("package", ["stores", "ablate", "coar"])
def test_no_module_has_a_version_of_its_own(package: str) -> None:
    said = re.compile(rf"__version__ *=|[\"']{re.escape(VERSION)}[\"']")
    assert not [file for file in (ROOT / package).rglob("*.py") if said.search(file.read_text(encoding="utf-8"))]


def test_lower_bounds_are_of_all_dependencies_and_the_highest_of_several() -> None:
    assert constraints(EXAMPLE) == ["torch==2.8", "moto==5.1", "ray==2.10"]


def test_no_library_is_capped() -> None:
    """Machines differ in what they can install; packages of weights, and tools, are pinned exactly."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    assert not [requirement for requirement in project["dependencies"] if re.search(r"==|<|~=", requirement)]
    assert {"torch==2.8", "torchvision==0.23"} <= set(constraints(PYPROJECT.read_text(encoding="utf-8")))
