"""What is imported when: names when they are asked for, commands when they are run, torch when there is a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import coar
from coar.cli.app import PANELS, Commands

HEAVY = {"torch", "numpy", "zarr", "pandas", "scipy", "sklearn", "numba", "matplotlib"}
MODELS = {"torch", "timm", "transformers", "numba", "scipy", "sklearn", "matplotlib"}
PROGRAM = """
import json, sys
try:
    {code}
except SystemExit as ended:
    print(ended.code)
print()
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""
RUN = "from coar.cli.app import main; main()"
QUIET = ["--quiet"]


def _imported(code: str, *arguments: object, **environment: str) -> set[str]:
    """Returns the packages that a fresh process has imported when it has run some code."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code=code), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import ablate, coar, stores", "import coar.metrics, ablate.loading, ablate.digits"])
def test_importing_a_package_imports_nothing_heavy(code: str) -> None:
    assert not _imported(code) & HEAVY


def test_a_name_brings_what_it_needs() -> None:
    """Else the tests here look for the wrong thing."""
    assert {"torch", "numpy"} <= _imported("import ablate; ablate.Engine")
    assert not _imported("import coar; coar.Attributions") & MODELS


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"], ["top"], ["verify"], ["export"]])
def test_help_and_bad_usage_import_nothing_heavy(arguments: list[str]) -> None:
    assert not _imported(RUN, *arguments) & HEAVY


@pytest.mark.parametrize(("words", "found"), [("coar sta", "status"), ("coar verify --qu", "--quiet")])
def test_completion_in_the_shell_imports_nothing_heavy(words: str, found: str) -> None:
    asked = {"_COAR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import sys; sys.argv[0] = 'coar'; {RUN}"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | asked,
    )  # fmt: skip
    assert done.stdout.split() == [found]
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & HEAVY


def test_commands_that_need_no_model_need_no_torch(
    write_attributions: Callable[..., coar.Attributions], tmp_path: Path
) -> None:
    place = tmp_path / "a.zarr"
    write_attributions([[1.0, 2, 3], [4, 5, 6]], place)
    for command in (
        ["status", place],
        ["verify", place, *QUIET],
        ["compact", place, *QUIET],
        ["repair", place, *QUIET],
        ["top", place, "--example", "0"],
        ["export", place, "--out", tmp_path / "a.csv"],
        ["export", place, "--out", tmp_path / "a.npz"],
    ):
        found = _imported(RUN, *command)
        assert not found & MODELS, command
        assert "zarr" in found, command
    assert (tmp_path / "a.csv").exists()
    assert (tmp_path / "a.npz").exists()


def test_every_command_is_where_the_table_says() -> None:
    group = Commands(name="coar")
    for panel, commands in PANELS.items():
        for name, place in commands.items():
            module, _, function = place.partition(":")
            text = getattr(import_module(module), function).__doc__
            shown, loaded = group.get_command(None, name), group.loaded(name)
            assert shown is not None
            assert (shown.rich_help_panel, loaded.name) == (panel, name)
            assert " ".join(str(shown.help).split()) == " ".join(text.split()) == " ".join(str(loaded.help).split())
