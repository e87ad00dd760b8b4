"""`coar plan`: on the digits' spec, with its finished stores beside it, and on specs with problems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import ablate
import stores
from coar.cli import plan as cli_plan

SECONDS = ("--seconds", "0.3")


@pytest.fixture
def plan_json(digits_spec: Callable[..., str], tmp_path: Path) -> Callable[..., Any]:
    """`plan_json(text, *arguments)`: plans a spec of this text; gives the JSON."""
    import json

    def call(text: str, *arguments: str) -> Any:
        result = _call(tmp_path, text, *arguments, "--json")
        assert result.exit_code == 0
        return json.loads(result.stdout)

    return call


def _call(folder: Path, text: str, *arguments: str) -> Any:
    (folder / "spec.toml").write_text(text)
    app = typer.Typer()
    app.command()(cli_plan.plan_spec)
    return CliRunner().invoke(app, [str(folder / "spec.toml"), *SECONDS, *arguments], catch_exceptions=False)


def test_plan_of_a_spec(digits_spec: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.toml").write_text(digits_spec(tmp_path / "new.zarr"))
    cli_plan.plan_spec(tmp_path / "spec.toml", workers=2, seconds=0.3)
    out = capsys.readouterr().out
    assert out.startswith("736 components x 16 examples, ablate fraction 0.05, blocks of 20 rows; 2 workers.\n")
    for said in ("regression, 60 rows", "gradient, 4 passes", "CPU core hours", "3 of 3", "Take gradient", "a guide"):
        assert said in out
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_json(digits_spec: Callable[..., str], plan_json: Callable[..., Any], tmp_path: Path) -> None:
    found = plan_json(digits_spec(tmp_path / "new.zarr"), "--workers", "3", "--target", "0.9")
    assert (found["components"], found["examples"], found["workers"]) == (736, 16, 3)
    assert {option["way"] for option in found["options"]} == {"regression", "gradient"}
    assert found["needs"]["gradient"]["target"] == 0.9
    assert found["speeds"]["gradient"] > 0


def test_finished_stores_leave_nothing_to_do(digits_spec: Callable[..., str], plan_json: Callable[..., Any]) -> None:
    left = {o["way"]: o["blocks_left"] for o in plan_json(digits_spec())["options"] if o["purpose"] == "spec"}
    assert left["regression"] == 0


def test_all_problems_of_a_spec_at_once(digits_spec: Callable[..., str], tmp_path: Path) -> None:
    text = digits_spec(tmp_path / "new.zarr").replace("rows = 60", "rows = 0").replace("passes = 4", "passes = 1")
    with pytest.raises(ablate.SpecError) as raised:
        _call(tmp_path, text)
    assert "rows: got 0" in str(raised.value)
    assert "passes: got 1" in str(raised.value)


def test_another_campaigns_store(digits_spec: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(stores.StoreMismatchError, match=r"plan\.seed: 0 -> 5"):
        _call(tmp_path, digits_spec(seed=5))


def test_registered(run: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    code, out, err = run("plan", folder / "spec.toml", *SECONDS)
    assert code == 0, err
    assert out.startswith("736 components x 16 examples")
