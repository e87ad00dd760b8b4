"""`coar export` and `coar import`: what they print, their JSON, their exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import coar
import stores

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def published(folder: Path, tmp_path: Path) -> Path:
    """The campaign of `folder` as the published code would have left it, two rows not completed."""
    campaign = stores.CampaignStore.open(folder / "campaign.zarr")
    run = tmp_path / "run"
    run.mkdir()
    np.save(run / "masks.npy", campaign.keep[:])
    np.save(run / "val_margins.npy", campaign.outputs[:])
    completed = np.ones(campaign.rows, dtype=bool)
    completed[[3, 7]] = False
    np.save(run / "_completed.npy", completed)
    return run


def test_export(run: Run, run_json: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    store, path = folder / "campaign-attributions.zarr", tmp_path / "a.csv"
    code, out, _ = run("export", store, "--out", path, "-k", "3")
    beside = tmp_path / "a.examples.csv"
    sizes = path.stat().st_size, beside.stat().st_size
    assert (code, out) == (0, f"Written: {path} ({sizes[0]:,} bytes), {beside} ({sizes[1]:,} bytes)\n")
    opened = coar.open_attributions(store)
    assert len(pd.read_csv(path)) == 3 * len(opened)
    found = run_json("export", store, "--out", tmp_path / "a.bin", "--format", "pt")
    assert found["files"] == {str(tmp_path / "a.bin"): (tmp_path / "a.bin").stat().st_size}
    weight = torch.load(tmp_path / "a.bin", weights_only=True)["weight"]
    np.testing.assert_allclose(weight.numpy().T, opened.weights[:] * (0.05 * 0.95) ** 0.5, rtol=1e-6)


def test_export_replaces_only_when_asked(run: Run, folder: Path, tmp_path: Path) -> None:
    store, path = folder / "campaign-estimate.zarr", tmp_path / "a.npz"
    assert run("export", store, "--out", path)[0] == 0
    code, out, err = run("export", store, "--out", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: There is something at {path} already.")
    assert run("export", store, "--out", path, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.txt"], "error: a.txt: the ending '.txt' says no format, expected one of .parquet, .npz, .csv"),
        (["--out", "a.csv", "--format", "cvs"], "error: No format 'cvs'. Did you mean 'csv'?"),
        (["--out", "a.csv", "-k", "1000"], "error: k is 1000, expected 1 to 736: there are 736 components."),
        (["--out", "a.pt", "-k", "3"], "error: k=3 is given for pt, which holds all components. Leave it out."),
    ],
)
def test_export_refuses(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", folder / "campaign-attributions.zarr", *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert not list(tmp_path.iterdir())


def test_import_a_campaign_and_fit_it(
    run: Run, run_json: Callable[..., Any], folder: Path, published: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zarr"
    code, text, err = run("import", published, "--out", out, "--spec", folder / "spec.toml", "--quiet")
    assert (code, err) == (0, "")
    assert text == (
        f"58 rows x 16 examples, 736 components, 0.05 ablated, in {out}. Left out as not completed: 2 rows.\n"
    )
    assert run_json("import", published, "--out", out, "--spec", folder / "spec.toml", "--quiet") == {
        "store": str(out),
        "kind": "campaign",
        "rows": 58,
        "left_out": 2,
        "examples": 16,
        "components": 736,
        "ablate_fraction": 0.05,
        "examples_dropped": 0,
    }
    assert run_json("status", out)["finished_rows"] == 58
    assert run_json("fit", out, "--quiet")["rows"] == 58
    found = run_json("evaluate", tmp_path / "a-attributions.zarr", "--rows", "8", "--seed", "5")
    assert found["fractions"][0]["examples"] == 16
    page = tmp_path / "report.html"
    assert run("report", tmp_path / "a-attributions.zarr", "--out", page)[0] == 0
    assert "by ridge on 58 keep-vectors of a campaign" in page.read_text()


def test_import_attributions_without_names(
    run: Run, run_json: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    run("export", folder / "campaign-attributions.zarr", "--out", tmp_path / "a.pt")
    out = tmp_path / "a.zarr"
    code, text, err = run("import", tmp_path / "a.pt", "--out", out, "--quiet")
    assert (code, err) == (0, "")
    assert text == f"16 attributions of 736 components in {out}. Quality: not measured.\n"
    facts = {"store": str(out), "kind": "attributions", "examples": 16, "components": 736, "in_output_units": True}
    facts |= {"examples_dropped": 0, "examples_without_attribution": 0}
    assert run_json("import", tmp_path / "a.pt", "--out", out, "--quiet") == facts
    top = run_json("top", out, "--example", "3", "-k", "4")
    expected = coar.open_attributions(folder / "campaign-attributions.zarr").top(3, 4)
    assert [row["component"] for row in top] == expected["component"].tolist()
    assert top[0]["z"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ablate-fraction", "0.5"], "ablated if True means kept, expected about 0.5. Correct ablate_fraction or"),
        (["--margins", "test_margins"], "error: No file of margins 'test_margins.npy'. Did you mean 'val_margins.npy'"),
        (["--true-means", "gone"], "error: No meaning of True 'gone'. Known: kept, ablated."),
        (["--components", "none.csv"], "error: none.csv cannot be read as a CSV table"),
        (["--overwrite"], "error: --overwrite is for attributions only: delete a campaign yourself, or name another."),
    ],
)
def test_import_refuses(run: Run, published: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, out, err = run("import", published, "--out", tmp_path / "a.zarr", "--quiet", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "a.zarr").exists()


def test_import_of_a_file_takes_no_options_of_folders(run: Run, tmp_path: Path) -> None:
    code, _, err = run("import", tmp_path / "a.pt", "--out", tmp_path / "a.zarr", "--assume-completed")
    assert code == 2
    assert err.startswith("error: --margins and --assume-completed are for a folder with masks.npy, and ")


def test_another_store_is_not_overwritten(run: Run, folder: Path, published: Path, tmp_path: Path) -> None:
    assert run("import", published, "--out", tmp_path / "a.zarr", "--quiet")[0] == 0
    np.save(published / "_completed.npy", np.ones(60, dtype=bool))
    code, _, err = run("import", published, "--out", tmp_path / "a.zarr", "--quiet")
    assert code == 4
    assert "plan.rows: 58 -> 60" in err
