"""What desktops and file systems put into folders is no matter to a store; `~` is the home folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ablate
import coar
import stores
from ablate.loading.sources import ImageFolderData, TorchvisionModel
from ablate.work.logs import log_to
from ablate.work.status import Watch
from stores.maintenance.compact import make_copies, remove_copies
from stores.storage.places import resolve, user_path

FOREIGN = (".DS_Store", "._0", "._zarr.json", ".nfs000001", "Thumbs.db", "desktop.ini")


@pytest.fixture
def spec() -> ablate.CampaignSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    return ablate.CampaignSpec(
        model=model, data=(torch.randn(6, 8), torch.arange(6) % 3), rows=40, ablate_fraction=0.2, block_rows=10
    )


def _folders(store: Path) -> Iterator[Path]:
    yield store
    yield from sorted(folder for folder in store.rglob("*") if folder.is_dir())


def _strew(store: Path) -> None:
    for folder in list(_folders(store)):
        for name in FOREIGN:
            (folder / name).write_bytes(b"\0\5\x16\7")


@pytest.mark.parametrize("kind", ["campaign", "attributions"])
def test_foreign_files_in_every_folder_are_no_matter(
    tmp_path: Path, spec: ablate.CampaignSpec, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.zarr"

    def run() -> None:
        if kind == "campaign":
            ablate.run(spec, place, progress=False)
        else:
            coar.estimate(spec, passes=2, quality_rows=0, block_examples=3, store=place)

    run()
    make_copies(place)
    _strew(place)
    report = stores.verify(place)
    assert report.sound
    assert (report.leftovers, report.partials) == ((), ())
    assert stores.repair(place).removed == ()
    assert stores.migrate(place).after == stores.migrate(place).before
    assert Watch(place).look().complete
    run()
    if kind == "campaign":
        coar.fit(place)
    assert all(not copy.made for copy in make_copies(place))
    assert remove_copies(place) > 0
    make_copies(place)
    (place / "ledger" / "c" / "1" / "0").unlink()
    run()
    assert stores.verify(place).sound


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, and a working directory beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_store_in_the_home_folder_is_there(home: Path, spec: ablate.CampaignSpec) -> None:
    store = ablate.run(spec, "~/runs/a.zarr", progress=False)
    assert Path(store.where) == home / "runs" / "a.zarr"
    assert stores.verify(home / "runs" / "a.zarr").sound
    coar.fit("~/runs/a.zarr", "~/runs/b.zarr")
    assert resolve("~/x") == home / "x"
    assert resolve(Path("~/x")) == home / "x"
    assert list(Path().iterdir()) == []


def test_every_file_that_is_named_may_be_in_the_home_folder(home: Path, spec: ablate.CampaignSpec) -> None:
    model, examples = spec.load()
    edit = coar.Edit(ablate.ComponentIndex.from_model(model).select([0]))
    edit.save("~/e.safetensors")
    assert coar.load_edit("~/e.safetensors").selection == edit.selection
    with log_to("~/logs/run.log"):
        pass
    found = coar.estimate(model, examples, passes=2, quality_rows=0, store="~/e.zarr")
    coar.export(found, "~/e.npz")
    coar.import_attributions("~/e.npz", "~/f.zarr")
    (home / "spec.toml").write_text("ablate_fraction = 0.1\n[model]\nsource = 'digits'\n[data]\nsource = 'digits'\n"
                                    "split = 'test'\n", encoding="utf-8")  # fmt: skip
    assert ablate.CampaignSpec.from_file("~/spec.toml").settings.ablate_fraction == 0.1
    assert TorchvisionModel(source="torchvision", name="resnet18", checkpoint="~/c.pt").checkpoint == str(home / "c.pt")
    assert ImageFolderData(source="imagefolder", path="~/images").path == str(home / "images")
    assert sorted(path.name for path in home.iterdir()) == [
        "e.npz", "e.safetensors", "e.zarr", "f.zarr", "logs", "spec.toml",
    ]  # fmt: skip
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["a~b.zarr", "runs/~/a.zarr", "~nobody-of-this-name/a.zarr"])
def test_a_tilde_elsewhere_is_a_letter(name: str) -> None:
    assert user_path(name) == Path(name)
