"""Commands that write stores, on a small real campaign: what they print, their JSON, their exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coar
import stores
from ablate.campaign.identity import package_versions

Run = Callable[..., tuple[int, str, str]]


def test_index(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    code, out, _ = run("index", folder / "spec.toml")
    assert code == 0
    assert out.startswith("736 components in 14 modules; index ")
    assert "blocks.5.conv2" in out
    assert "Left out:" in out
    found = run_json("index", folder / "spec.toml")
    store = stores.CampaignStore.open(folder / "campaign.zarr")
    assert (found["components"], found["hash"]) == (736, store.header["identity"]["index"])
    assert sum(module["components"] for module in found["modules"]) == 736


def test_index_explains_how_each_module_is_gated(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    code, out, _ = run("index", folder / "spec.toml", "--explain")
    assert code == 0
    assert "How each module is gated:" in out
    gating = run_json("index", folder / "spec.toml", "--explain")["gating"]
    assert [row["module"] for row in gating][:2] == ["stem", "blocks.0.conv1"]
    assert {row["activation gating"] for row in gating} == {"gated layer"}
    assert "batch norm 'bn' folded in" in gating[0]["notes"]


def test_a_factory_in_the_working_directory(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_cli.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))\n"
    )
    text = (folder / "spec.toml").read_text()
    start, end = text.index("[model]"), text.index("[", text.index("[model]") + 1)
    factory = '[model]\nsource = "factory"\nfactory = "mine_for_cli:net"\n'
    (tmp_path / "spec.toml").write_text(text[:start] + factory + text[end:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    code, out, _ = run("index", "spec.toml")
    assert (code, out[:26]) == (0, "3 components in 1 modules;")


def test_ablate_again_finds_it_complete(run: Run, folder: Path) -> None:
    code, out, _ = run("ablate", folder / "spec.toml")
    assert code == 0
    assert out == f"Complete: 60 rows x 16 examples in {folder}/campaign.zarr\n"


def test_ablate_goes_on_where_it_stopped(run: Run, folder: Path, unfinished: Path) -> None:
    code, out, err = run("ablate", folder / "spec.toml", "--store", unfinished, "--quiet")
    assert (code, err) == (0, "")
    assert out == f"Complete: 60 rows x 16 examples in {unfinished}\n"
    whole, again = (stores.CampaignStore.open(path) for path in (folder / "campaign.zarr", unfinished))
    np.testing.assert_array_equal(again.outputs[:], whole.outputs[:])


def test_ablate_refuses_another_campaigns_store(
    run: Run, folder: Path, digits_spec: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "spec.toml").write_text(digits_spec(seed=5))
    code, out, err = run("ablate", tmp_path / "spec.toml")
    assert (code, out) == (4, "")
    assert err == (
        f"error: Campaign {folder}/campaign.zarr was made from something else. What differs (stored -> now):\n"
        "  plan.seed: 0 -> 5\n"
        "Give the original back, or name another store for the new campaign.\n"
    )


def test_ablate_with_other_versions(run: Run, folder: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = {**package_versions(), "torch": "9.0"}
    monkeypatch.setattr("ablate.campaign.identity.package_versions", lambda: newer)
    command = ("ablate", folder / "spec.toml", "--store", unfinished, "--quiet")
    code, _, err = run(*command)
    assert code == 4, err
    assert "versions.torch: " in err
    assert " -> 9.0" in err
    assert "(`--accept-versions`)" in err
    assert run(*command, "--accept-versions")[0] == 0


def test_ablate_stops_at_an_output_that_is_no_number(run: Run, digits_spec: Callable[..., str], tmp_path: Path) -> None:
    inputs = np.zeros((3, 1, 16, 16), dtype=np.float32)
    inputs[1, 0, 3, 3] = np.nan
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=[0, 1, 0], ids=["fine", "sick", "well"])
    text = digits_spec(tmp_path / "sick.zarr").split("[data]")[0]
    (tmp_path / "spec.toml").write_text(f'{text}\n[data]\nsource = "arrays"\npath = "{tmp_path}/data.npz"\n')
    code, out, err = run("ablate", tmp_path / "spec.toml", "--store", tmp_path / "sick.zarr", "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("error: Output of keep row 0 on example 1 (id 'sick') is nan, expected a finite number.")


def test_fit(run: Run, run_json: Callable[..., Any], unfinished: Path) -> None:
    target = unfinished.parent / "unfinished-attributions.zarr"
    code, out, err = run("fit", unfinished, "--quiet")
    assert (code, err) == (0, "")
    mean = coar.open_attributions(target).quality["correlation"].mean()
    assert out == (f"16 attributions from 40 rows in {target}. Held-out correlation, mean over examples: {mean:.3f}\n")
    found = run_json("fit", unfinished, "--quiet")
    assert found == {
        "store": str(target),
        "rows": 40,
        "examples": 16,
        "held_out_correlation": pytest.approx(mean),
    }


def test_fit_with_every_option(run: Run, unfinished: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    options = ("--method", "lasso", "--ablate-fraction", "0.05", "--fit-all", "--device", "cpu", "--quiet")
    code, out, err = run("fit", unfinished, "--out", target, *options)
    assert (code, err) == (0, "")
    assert out == f"16 attributions from 40 rows in {target}. No rows were held out.\n"
    identity = coar.open_attributions(target).header["identity"]
    assert (identity["method"], identity["held_out"]) == ("lasso", False)
    code, _, err = run("fit", unfinished, "--out", target, "--method", "forest")
    assert (code, err) == (2, "error: method is 'forest', expected one of ridge, ols, lasso.\n")


def test_fit_refuses_to_replace_another_fit_unasked(run: Run, unfinished: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    assert run("fit", unfinished, "--out", target, "--quiet")[0] == 0
    code, out, err = run("fit", unfinished, "--out", target, "--ridge", "3")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: Attribution store {target} was made from something else.")
    assert "  ridge: chosen per example -> 3.0\n" in err
    assert run("fit", unfinished, "--out", target, "--ridge", "3", "--overwrite", "--quiet")[0] == 0
    assert (coar.open_attributions(target).quality["ridge"] == 3).all()


def test_fit_in_too_little_memory(run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = run("fit", folder / "campaign.zarr", "--out", tmp_path / "a.zarr", "--memory-gib", "0.01")
    assert code == 2
    assert err.startswith("error: memory=10,737,418 bytes is too small to fit 736 components: at least ")


def test_all_problems_of_a_spec_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(
        """
rows = 0
ablate_fractoin = 0.05
output = "margn"
precision = "float16"

[model]
source = "torchvison"

[data]
source = "arrays"
path = "x.npz"
"""
    )
    code, out, err = run("ablate", tmp_path / "spec.toml")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == f"error: {tmp_path}/spec.toml: 6 problems"
    for start in (
        "rows: got 0, but it should be greater than or equal to 1",
        "ablate_fraction: missing. Give it.",
        "ablate_fractoin: unknown key. Did you mean 'ablate_fraction'?",
        "output: got 'margn', expected one of margin, logit, log_probability, loss, value, token_margin. Did",
        "precision: got 'float16', expected one of float32, float64",
        "model.source: got 'torchvison', expected one of digits, torchvision, timm, open_clip",
    ):
        assert any(start in line for line in lines[1:]), f"{start!r} is missing in\n{err}"


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read: No such file"), ("rows = = 1", "is no TOML")])
def test_a_spec_that_cannot_be_read(run: Run, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "spec.toml").write_text(content)
    for command in ("index", "ablate", "estimate"):
        code, _, err = run(command, tmp_path / "spec.toml")
        assert code == 2
        assert err.startswith(f"error: {tmp_path}/spec.toml: 1 problem\n  1. {message}")


def test_a_spec_without_a_store(run: Run, folder: Path, tmp_path: Path) -> None:
    text = "\n".join(line for line in (folder / "spec.toml").read_text().splitlines() if not line.startswith("store"))
    (tmp_path / "spec.toml").write_text(text)
    code, _, err = run("ablate", tmp_path / "spec.toml")
    assert code == 2
    assert "store: missing. Name one in the spec, or pass store=." in err
    assert run("estimate", tmp_path / "spec.toml") == (
        2,
        "",
        f"error: {tmp_path}/spec.toml: 1 problem\n  1. store: missing. Name one in the spec, or pass --out.\n",
    )
