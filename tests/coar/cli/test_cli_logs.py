"""`--log`, `--log-format` and `--tensorboard` of long commands, and what they tell on stderr unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Run = Callable[..., tuple[int, str, str]]
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


@pytest.fixture
def sick_spec(digits_spec: Callable[..., str], tmp_path: Path) -> Path:
    """A campaign of one block whose second example gives outputs that are no numbers."""
    inputs = np.zeros((3, 1, 16, 16), dtype=np.float32)
    inputs[1, 0, 3, 3] = np.nan
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=[0, 1, 0], ids=["fine", "sick", "well"])
    text = digits_spec(tmp_path / "sick.zarr").split("[data]")[0].replace("block_rows = 20", "block_rows = 60")
    path = tmp_path / "spec.toml"
    path.write_text(f'{text}\n[data]\nsource = "arrays"\npath = "{tmp_path}/data.npz"\n')
    return path


def events(text: str) -> list[Any]:
    return [json.loads(line)["event"] for line in text.splitlines()]


def test_a_campaign_into_a_file(run: Run, folder: Path, unfinished: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.jsonl"
    command = ("ablate", folder / "spec.toml", "--store", unfinished, "--quiet")
    code, _, err = run(*command, "--log", log, "--log-format", "json")
    assert (code, err) == (0, "")
    assert events(log.read_text()) == ["worker_began", "block_finished", "worker_ended"]


def test_an_estimate_to_stderr(run: Run, folder: Path, tmp_path: Path) -> None:
    command = ("estimate", folder / "spec.toml", "--out", tmp_path / "a.zarr", "--method", "random")
    code, out, err = run(*command, "--quality-rows", "10", "--quiet", "--log", "-", "--log-format", "json")
    assert code == 0
    assert out.startswith("16 attributions by random ")
    began, finished, ended = [json.loads(line) for line in err.splitlines()]
    assert (began["event"], finished["event"], ended["event"]) == ("worker_began", "block_finished", "worker_ended")
    assert set(finished["measured"]) == {"correlation"}


def test_text_beside_the_progress(run: Run, folder: Path, unfinished: Path) -> None:
    code, _, err = run("ablate", folder / "spec.toml", "--store", unfinished, "--log", "-")
    assert code == 0
    assert " INFO    block 2 finished: 20 rows in " in err
    assert "60/60" in err
    assert "\r" not in err


def test_trouble_is_told_unasked_but_not_when_quiet(run: Run, sick_spec: Path) -> None:
    code, _, err = run("ablate", sick_spec)
    assert code == 3
    told = [
        line for line in err.splitlines() if line.startswith("error: block 0 (keep rows 0 to 59) failed, set aside: ")
    ]
    assert len(told) == 1
    code, _, err = run("ablate", sick_spec, "--quiet")
    assert code == 3
    assert "error: block 0" not in err
    assert err.startswith("error: ")


@needs_tensorboard
def test_curves(run: Run, folder: Path, unfinished: Path, tmp_path: Path) -> None:
    command = ("ablate", folder / "spec.toml", "--store", unfinished, "--quiet")
    code, _, err = run(*command, "--tensorboard", tmp_path / "curves")
    assert (code, err) == (0, "")
    (worker,) = (tmp_path / "curves").iterdir()
    assert [file.name.split(".")[:3] for file in worker.iterdir()] == [["events", "out", "tfevents"]]


def test_another_format_is_refused(run: Run, folder: Path) -> None:
    code, _, err = run("ablate", folder / "spec.toml", "--log", "x", "--log-format", "yaml")
    assert code == 2
    assert "yaml" in err
    assert not Path("x").exists()
