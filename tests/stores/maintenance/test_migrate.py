"""Stores that format 1 wrote are read as they are, and `migrate` brings them to format 2 without changing a number.

`fixtures/v1.tar.gz` was written by the last version of the toolkit with format 1: a finished campaign, one of which
blocks 2 and 5 are missing, and gradient attributions, all of the small network in tests/faults/victim.py; and
`expected.npz`, what that version read from them.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import xarray
from zarr.storage import LocalStore, MemoryStore

import stores
from stores import AttributionStore, CampaignStore, OldFormatError, StoreError, StoreUnreadableError
from stores.format.root import seal_of
from stores.storage import objects

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v1.tar.gz"
FINISHED_ROWS = [*range(14), *range(21, 35)]
NAMES = ("finished", "unfinished", "attributions")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of the old stores, to change."""
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "v1"


@pytest.fixture
def expected(old: Path) -> dict[str, npt.NDArray[Any]]:
    """What the old version read."""
    with np.load(old / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def _files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _check(old: Path, expected: dict[str, npt.NDArray[Any]]) -> None:
    """Compares all that the stores show with what the old version read."""
    for name, rows in (("finished", list(range(40))), ("unfinished", FINISHED_ROWS)):
        campaign = CampaignStore.open(old / f"{name}.zarr")
        assert campaign.finished_rows.tolist() == rows
        np.testing.assert_array_equal(campaign.outputs[:], expected["outputs"][rows], strict=True)
        np.testing.assert_array_equal(campaign.keep[:], expected["keep"][rows], strict=True)
        assert campaign.examples["id"].tolist() == [f"cat-{i}" for i in range(9)]
        assert len(campaign.components["name"]) == 10
        assert [environment["threads"] for environment in campaign.environments] == [1]
    found = AttributionStore.open(old / "attributions.zarr")
    for key in ("weights", "stderr", "bias"):
        np.testing.assert_array_equal(getattr(found, key)[:], expected[key], strict=True)
    np.testing.assert_array_equal(found.quality["correlation"], expected["correlation"], strict=True)
    assert all(stores.verify(old / f"{name}.zarr").sound for name in NAMES)


def test_the_old_format_is_read_as_it_is(old: Path, expected: dict[str, npt.NDArray[Any]]) -> None:
    before = _files(old)
    _check(old, expected)
    assert _files(old) == before
    assert stores.verify(old / "finished.zarr").format_version == 1


@pytest.mark.parametrize(
    ("name", "open_to_write"),
    [
        ("unfinished", lambda path: CampaignStore.open(path, mode="r+")),
        ("attributions", lambda path: AttributionStore.open(path, finish=True)),
        ("unfinished", stores.repair),
    ],
)
def test_the_old_format_is_not_written(old: Path, name: str, open_to_write: Callable[[Path], Any]) -> None:
    path = old / f"{name}.zarr"
    with pytest.raises(OldFormatError) as raised:
        open_to_write(path)
    assert str(raised.value) == (
        f"{path} was written by an older version of the toolkit (format 1; this version writes 2). It can be read as "
        f"it is. To go on with it, run `coar migrate {path}` once: no number changes, but older versions will not open "
        "it any more."
    )


def test_migrating_changes_no_number(old: Path, expected: dict[str, npt.NDArray[Any]]) -> None:
    before = _files(old)
    for name in NAMES:
        path = old / f"{name}.zarr"
        done = stores.migrate(path)
        assert (done.where, done.before, done.after) == (str(path), 1, 2)
        assert done.text() == f"{path}: format 1 became format 2. No number was changed."
        assert stores.migrate(path).text() == f"{path} has format 2 already: nothing to do."

    after = _files(old)
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    own = {f"{name}.zarr/{key}" for name in NAMES for key in ("zarr.json", "work/workers/format-1-0.json")}
    assert changed == own
    _check(old, expected)
    assert CampaignStore.open(old / "unfinished.zarr", mode="r+").missing_blocks() == [2, 5]
    assert AttributionStore.open(old / "attributions.zarr", finish=True).missing_blocks() == []
    assert set(xarray.open_zarr(old / "finished.zarr")) == {"outputs", "keep", "ledger"}


def test_a_migrated_root_says_what_the_old_one_said(old: Path) -> None:
    path = old / "finished.zarr"
    was = json.loads((path / "zarr.json").read_text())
    stores.migrate(path)
    root = json.loads((path / "zarr.json").read_text())

    environments = was["attributes"].pop("environments")
    header = {**was["attributes"], "format_version": 2, "seal": seal_of(root)}
    assert root == {**was, "attributes": header}
    assert CampaignStore.open(path).environments == environments


@pytest.mark.faults
@pytest.mark.parametrize("name", ["create", "replace", "flush"])
def test_a_migration_that_is_cut_short_is_done_again(
    old: Path, expected: dict[str, npt.NDArray[Any]], name: str
) -> None:
    path = old / "unfinished.zarr"
    with mock.patch(f"stores.storage.objects.{name}", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        stores.migrate(path)
    CampaignStore.open(path)  # old or new, but whole

    for each in NAMES:
        stores.migrate(old / f"{each}.zarr")
    _check(old, expected)


def test_a_memory_store_is_migrated_too(old: Path) -> None:
    memory = MemoryStore()
    for key, data in _files(old / "finished.zarr").items():
        objects.replace(memory, key, data)

    assert stores.migrate(memory).before == 1
    assert CampaignStore.open(memory, mode="r+").progress.complete


def test_a_damaged_block_of_an_old_store_is_repaired_after_migrating(old: Path) -> None:
    path = old / "finished.zarr"
    (path / "outputs" / "c" / "3" / "0").unlink()
    assert stores.verify(path).damaged_blocks == [3]

    stores.migrate(path)

    assert stores.repair(path).forgotten == (3,)
    assert CampaignStore.open(path).missing_blocks() == [3]


@pytest.mark.parametrize("version", [3, 4, 99])
@pytest.mark.parametrize("look", [stores.verify, stores.repair, stores.migrate, CampaignStore.open])
def test_a_newer_format_is_left_alone(old: Path, version: int, look: Callable[[Path], Any]) -> None:
    path = old / "finished.zarr"
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["format_version"] = version
    document["attributes"]["something"] = "new"
    (path / "zarr.json").write_text(json.dumps(document))
    before = _files(path)

    with pytest.raises(StoreUnreadableError) as raised:
        look(path)

    assert str(raised.value) == (
        f"{path} was written by a newer version of the toolkit (format {version}; this version reads up to 2). "
        "Upgrade: pip install --upgrade component-attribution."
    )
    assert _files(path) == before


@pytest.mark.parametrize("version", [0, -1, 1.5, "2", True, None, [2]])
def test_a_version_that_is_none_is_damage(old: Path, version: Any) -> None:
    path = old / "finished.zarr"
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["format_version"] = version
    (path / "zarr.json").write_text(json.dumps(document))

    with pytest.raises(
        StoreUnreadableError, match=r"has format version .*, expected a number\. Its metadata is damaged"
    ):
        CampaignStore.open(path)


def test_the_read_only_store_of_an_old_campaign_is_not_made_writable(old: Path) -> None:
    store = LocalStore(old / "finished.zarr", read_only=True)
    assert CampaignStore.open(store).progress.complete
    for change in (stores.migrate, stores.repair):
        with pytest.raises(StoreError, match="is a store object for reading only"):
            change(store)
    assert CampaignStore.open(old / "finished.zarr").header["format_version"] == 1
