"""The command line as a whole: its commands, help, exit codes and errors; never a traceback."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import coar

COMMANDS = (
    "demo",
    "index",
    "ablate",
    "status",
    "fit",
    "estimate",
    "evaluate",
    "top",
    "nearest",
    "compare",
    "edit",
    "edit-info",
    "report",
    "plan",
    "choose-fraction",
    "verify",
    "repair",
    "migrate",
    "compact",
    "export",
    "import",
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attributions(folder: Path) -> Path:
    """The attribution store of `folder`."""
    return folder / "campaign-attributions.zarr"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"coar {command}" in out
    assert len(out.splitlines()) > 6


def test_estimate_helps_with_every_method(run: Run) -> None:
    _, out, _ = run("estimate", "--help")
    assert all(method in out for method in coar.estimator_names())


def test_the_installed_command_lists_every_command() -> None:
    coar_command = Path(sys.executable).parent / "coar"
    done = subprocess.run([coar_command, "--help"], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)


def test_the_installed_command_fails_without_a_traceback(tmp_path: Path) -> None:
    coar_command = Path(sys.executable).parent / "coar"
    done = subprocess.run([coar_command, "status", tmp_path / "none.zarr"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: No campaign store at {tmp_path}/none.zarr: nothing is there. Check the path, or make one first.\n"
    )


def test_a_place_where_nothing_can_be_written(run: Run, attributions: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    out = tmp_path / "file" / "report.html"
    code, _, err = run("report", attributions, "--out", out)
    assert code == 1
    assert err.startswith("error: [Errno ")
    assert str(tmp_path / "file") in err


@pytest.mark.parametrize("command", ["evaluate", "top", "report"])
def test_attributions_that_are_not_there(run: Run, tmp_path: Path, command: str) -> None:
    options = {"top": ["--example", "0"], "report": ["--out", str(tmp_path / "r.html")]}.get(command, [])
    code, out, err = run(command, tmp_path / "none.zarr", *options)
    assert (code, out) == (2, "")
    assert err == (
        f"error: No attributions store at {tmp_path}/none.zarr: nothing is there. Check the path, or make one first.\n"
    )


def test_attributions_that_are_not_finished(run: Run, attributions: Path, tmp_path: Path) -> None:
    copied = tmp_path / "a.zarr"
    shutil.copytree(attributions, copied)
    (copied / "ledger" / "c" / "0" / "0").unlink()
    code, out, err = run("evaluate", copied)
    assert (code, out) == (3, "")
    assert err == (f"error: {copied}: only 0 of 1 blocks of examples are estimated. Run the same again to finish it.\n")


def test_a_campaign_given_where_attributions_belong(run: Run, folder: Path) -> None:
    code, _, err = run("top", folder / "campaign.zarr", "--example", "0")
    assert code == 2
    assert err == (
        f"error: {folder}/campaign.zarr is no attributions store: its format is 'campaign'. Check the path.\n"
    )


def test_a_damaged_block(run: Run, unfinished: Path, tmp_path: Path) -> None:
    (unfinished / "outputs" / "c" / "1" / "0").unlink()
    code, out, err = run("fit", unfinished, "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith(
        f"error: {unfinished}: block 1 (rows 20 to 39) is damaged: the file of 'outputs' is gone (outputs/c/1/0)."
    )


def test_version(run: Run) -> None:
    assert run("--version") == (0, "coar 0.1.0\n", "")
