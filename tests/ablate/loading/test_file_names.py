"""Names of files that are not UTF-8, as old archives unpack them: shown and stored with their bytes as \\xNN."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ablate
import coar
from ablate.work.logs import log_to

LATIN = "caf\udce9"  # os.fsdecode(b"caf\xe9")


def _spec(ids: list[str], groups: list[str] | None = None) -> ablate.CampaignSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    data = ablate.Examples(torch.randn(4, 8), [0, 1, 0, 1], ids, groups)
    return ablate.CampaignSpec(model=model, data=data, rows=40, ablate_fraction=0.2)


def test_ids_and_groups_are_stored_with_their_bytes(tmp_path: Path) -> None:
    spec = _spec(["a", LATIN, "c\ud800", "日本 🙂\n"], [LATIN, "x", "x", "x"])
    store = ablate.run(spec, tmp_path / "a.zarr", progress=False)
    assert list(store.examples["id"]) == ["a", "caf\\xe9", "c\\ud800", "日本 🙂\n"]
    assert store.examples["group"][0] == "caf\\xe9"
    fitted = coar.fit(store)
    assert fitted.locate(["caf\\xe9"]) == [1]


def test_ids_that_become_the_same_are_refused() -> None:
    with pytest.raises(ablate.DataError, match="Ids must be distinct"):
        ablate.Examples(torch.zeros(2, 3), [0, 1], [LATIN, "caf\\xe9"])


@pytest.mark.skipif(sys.platform == "darwin" or os.name == "nt", reason="the file system takes UTF-8 only")
def test_an_image_folder_and_a_store_of_such_names(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (20, 20), "red")
    data = io.BytesIO()
    image.save(data, "PNG")
    for folder, name in (("a", "x.png"), (LATIN, "y\udce9.png")):
        (tmp_path / LATIN / folder).mkdir(parents=True)
        (tmp_path / LATIN / folder / name).write_bytes(data.getvalue())
    pytest.importorskip("timm")
    spec = ablate.CampaignSpec(
        model={"source": "timm", "name": "test_resnet", "classes": 2},
        data={"source": "imagefolder", "path": str(tmp_path / LATIN)},
        rows=2,
        ablate_fraction=0.1,
    )
    with log_to(tmp_path / f"{LATIN}.log"):
        store = ablate.run(spec, tmp_path / f"{LATIN}.zarr", progress=False)
    assert sorted(store.examples["id"]) == ["a/x.png", "caf\\xe9/y\\xe9.png"]
    assert ablate.run(spec, tmp_path / f"{LATIN}.zarr", progress=False).progress.complete
    assert "worker" in (tmp_path / f"{LATIN}.log").read_text(encoding="utf-8")
