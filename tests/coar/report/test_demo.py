"""The demo from end to end, with fewer keep-vectors and images than the real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import ablate
import coar
import coar.demo
import stores
from coar.demo import DemoResult, demo_spec, run_demo
from stores import AttributionStore, CampaignStore

FILES = ["attributions.zarr", "campaign.zarr", "edit.safetensors", "model.safetensors", "report.html"]


def _small_spec(out: Any, seed: int, quick: bool = False) -> ablate.CampaignSpec:
    """The demo's own spec with 80 keep-vectors and 4 images per group."""
    values = demo_spec(out, seed).describe()
    values["rows"], values["block_rows"] = 80, 20
    values["data"] = {"source": "digits", "seed": seed, "train_per_group": 2, "test_per_group": 2}
    return ablate.CampaignSpec.from_dict(values, "the small demo")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the demo small."""
    monkeypatch.setattr(coar.demo, "demo_spec", _small_spec)
    monkeypatch.setattr(coar.demo, "EDIT_SIZES", (0, 10, 30))


def test_the_demos_spec(tmp_path: Path) -> None:
    spec = demo_spec(tmp_path, seed=3).describe()
    assert (spec["rows"], spec["ablate_fraction"], spec["seed"], spec["output"]) == (3000, 0.05, 3, "margin")
    assert spec["store"] == str(tmp_path / "campaign.zarr")
    assert spec["model"] == {"source": "digits", "seed": 3, "cache": str(tmp_path / "model.safetensors")}
    assert demo_spec(tmp_path).loadable


def test_the_quick_demos_spec_is_the_same_but_smaller(tmp_path: Path) -> None:
    quick, usual = (demo_spec(tmp_path, quick=quick).describe() for quick in (True, False))
    assert (quick["rows"], quick["data"]["train_per_group"], quick["data"]["test_per_group"]) == (300, 5, 5)
    assert {key for key in usual if quick[key] != usual[key]} == {"rows", "data"}


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_demo_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: Any) -> None:
    said: list[tuple[str, pd.DataFrame | None]] = []
    with untouched():
        found = run_demo(tmp_path, 0, lambda text, table: said.append((text, table)), progress=False)
    assert [text[0] for text, _ in said] == ["1", "3", "4", "5", "6", "7"]
    assert set(FILES) <= {path.name for path in tmp_path.iterdir()}
    _require_report(found)
    _require_edit(found, tmp_path)

    before = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if ".zarr" in str(path) or "model" in str(path)
    }
    monkeypatch.setattr(CampaignStore, "write_block", None)  # what is finished is reused: writing would fail
    monkeypatch.setattr(AttributionStore, "write_block", None)
    again = run_demo(tmp_path, 0, lambda text, table: None, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.edit == found.edit
    assert (again.before, again.after) == (found.before, found.after)
    np.testing.assert_array_equal(again.evaluation.correlations, found.evaluation.correlations)


def _require_report(found: DemoResult) -> None:
    page = found.report.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(addresses) == 6
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    of = found.attributions.header["identity"]["of"]
    assert all(of[name] in page for name in ("model", "data", "index"))
    assert "The repair" in page


def _require_edit(found: DemoResult, folder: Path) -> None:
    """The edit in the file, on the model in the cache, has the accuracies that the demo tells."""
    model, _ = _small_spec(folder, 0).load()
    edit = coar.load_edit(folder / "edit.safetensors")
    assert edit == found.edit
    assert len(edit.selection) in (10, 30)
    examples = ablate.digits.digits_split("test", 0)
    for network, told in ((model, found.before), (edit.apply(model), found.after)):
        correct = network(examples.inputs()).argmax(1) == examples.targets
        assert coar.group_accuracy(correct.numpy(), examples.groups) == told
    assert stores.CampaignStore.open(folder / "campaign.zarr").progress.complete
