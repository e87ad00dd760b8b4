"""What is released: built as `make dist` does, put into an environment of its own, and used from another folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("stores", "ablate", "coar")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_DEVELOPERS = {"dev", "docs"}
PROGRAM = """
import importlib.metadata, json
import ablate, coar, stores
print(json.dumps([[p.__file__ for p in (stores, ablate, coar)], importlib.metadata.version("component-attribution")]))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("dist")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source and the wheel, built from a copy of the working tree."""
    source, out = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel."""
    [found] = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheel, and with what the core needs from this one; extras cannot be had."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    _run([*pip, "install", "--no-deps", "--no-index", "--quiet", wheel], folder)
    [packages] = folder.glob("lib/python*/site-packages")
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "libraries.pth").write_text("".join(f"{place}\n" for place in sorted(places)))
    lacking = dict.fromkeys(_modules_of_extras())  # None: importing it fails as if it were not there
    (packages / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({lacking!r})\n")
    return programs


def _modules_of_extras() -> list[str]:
    """Returns what users have only if they asked for an extra."""
    extras = PROJECT["optional-dependencies"]
    wanted = chain.from_iterable(extras[name] for name in extras.keys() - FOR_DEVELOPERS)
    names = {_normal(re.split(r"[\[>=]", requirement)[0]) for requirement in wanted} - {_normal(PROJECT["name"])}
    found = importlib.metadata.packages_distributions()
    return sorted(module for module, brought_by in found.items() if names & set(map(_normal, brought_by)))


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _run(command: list[Any], folder: Path) -> str:
    """Runs a program without this repository on its path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"component_attribution-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*SHIPPED, about}
    here = {str(path.relative_to(ROOT)) for package in SHIPPED for path in (ROOT / package).rglob("*.*")}
    sources = {name for name in here if "__pycache__" not in name and (ROOT / name).is_file()}
    assert {name for name in names if not name.startswith(about)} == sources


def test_the_wheel_has_data_files_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"{package}/py.typed" for package in SHIPPED} <= set(names)
    for end in ("demo.toml", "report.html.jinja", "licenses/LICENSE"):
        assert [name for name in names if name.endswith(f"/{end}")], end


def test_the_source_can_be_built_and_read(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "ablate/__init__.py"} <= names
    assert not [name for name in names if name.startswith("experiments")]


def test_the_installed_packages_are_those_of_the_wheel(fresh: Path, tmp_path: Path) -> None:
    files, version = json.loads(_run([fresh / "python", "-c", PROGRAM], tmp_path))
    assert version == PROJECT["version"]
    assert all(Path(file).is_relative_to(fresh.parent) for file in files)


def test_there_is_no_extra_beside_the_wheel(fresh: Path, tmp_path: Path) -> None:
    """Else the test below would prove less than it says."""
    program = "import importlib.util as u; print([m for m in {} if u.find_spec(m)])"
    modules = [name for name in _modules_of_extras() if name.isidentifier()]
    assert {"ray", "transformers", "pyarrow"} <= set(modules)
    assert _run([fresh / "python", "-c", program.format(modules)], tmp_path) == "[]\n"


def test_the_installed_command_runs_the_quick_demo(fresh: Path, tmp_path: Path) -> None:
    out = _run([fresh / "coar", "demo", "--quick"], tmp_path)
    assert out.startswith("This is the quick demo: 300 keep-vectors x 40 images.")
    assert "7. Report: runs/demo-quick/report.html" in out
    assert (tmp_path / "runs/demo-quick/report.html").stat().st_size > 100_000
    assert _run([fresh / "coar", "--version"], tmp_path) == f"coar {PROJECT['version']}\n"
