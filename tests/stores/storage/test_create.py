"""Making a store is all or nothing: an error leaves nothing behind, and nothing that is there is overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

import stores.format.groups
from stores import CampaignStore, StoreExistsError, StoreNotFoundError

NewCampaign = Callable[..., CampaignStore]


def _tree(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def _fail_after(count: int, error: BaseException) -> Callable[..., None]:
    """Returns a `write_columns` that raises the error when it is called for the `count`-th time."""
    whole, calls = stores.format.groups.write_columns, iter(range(1, 9))

    def write(*args: Any) -> None:
        whole(*args)
        if next(calls) == count:
            raise error

    return write


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt("disk full")])
def test_an_error_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_campaign: NewCampaign, count: int, error: BaseException
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("stores.campaign.write_columns", _fail_after(count, error))
        with pytest.raises(type(error), match="disk full"):
            new_campaign(tmp_path / "a.zarr")
        assert _tree(tmp_path) == {}

        patch.setattr("stores.campaign.write_columns", _fail_after(count, error))
        memory = MemoryStore()
        with pytest.raises(type(error), match="disk full"):
            new_campaign(memory)
        with pytest.raises(StoreNotFoundError, match="nothing is there"):
            CampaignStore.open(memory)

    new_campaign(tmp_path / "a.zarr")
    new_campaign(memory)


def test_bad_columns_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="id"):
        CampaignStore.create(tmp_path / "a", header={}, components={}, examples={}, rows=1, block_rows=1)
    with pytest.raises(TypeError, match="JSON serializable"):
        CampaignStore.create(
            tmp_path / "a",
            header={"model": object()},
            components={"id": np.arange(2)},
            examples={"id": np.arange(2)},
            rows=1,
            block_rows=1,
        )
    assert _tree(tmp_path) == {}


def _a_campaign(path: Path, new_campaign: NewCampaign) -> None:
    new_campaign(path)


def _a_file(path: Path, new_campaign: NewCampaign) -> None:
    path.write_text("thesis")


def _a_folder(path: Path, new_campaign: NewCampaign) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("")


@pytest.mark.parametrize("make", [_a_campaign, _a_file, _a_folder])
def test_what_is_there_stays(
    tmp_path: Path, new_campaign: NewCampaign, make: Callable[[Path, NewCampaign], None]
) -> None:
    path = tmp_path / "a"
    make(path, new_campaign)
    before = path.read_bytes() if path.is_file() else _tree(path)

    with pytest.raises(StoreExistsError) as raised:
        new_campaign(path)

    assert str(raised.value) == f"There is something at {path} already. Choose another place or remove it."
    assert before == (path.read_bytes() if path.is_file() else _tree(path))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_a_store_object_stays(tmp_path: Path, new_campaign: NewCampaign) -> None:
    local = LocalStore(tmp_path / "a")
    zarr.create_array(local, name="thesis/figures", shape=(2,), dtype="int8")  # not at the root
    before = _tree(tmp_path)

    with pytest.raises(StoreExistsError, match=r"There is something at file://.* already"):
        new_campaign(local)
    assert _tree(tmp_path) == before


def test_an_empty_folder_is_taken(tmp_path: Path, new_campaign: NewCampaign) -> None:
    (tmp_path / "a").mkdir()

    new_campaign(tmp_path / "a")

    assert CampaignStore.open(tmp_path / "a").missing_blocks() == [0, 1, 2]


def test_folders_above_are_made(tmp_path: Path, new_campaign: NewCampaign) -> None:
    new_campaign(tmp_path / "runs" / "digits" / "a.zarr")

    assert [p.name for p in (tmp_path / "runs" / "digits").iterdir()] == ["a.zarr"]


def test_drafts_of_killed_programs_are_swept(tmp_path: Path, new_campaign: NewCampaign) -> None:
    kept = [".a.zarr.tar.0123abcd.draft", ".b.zarr.0123abcd.draft", "a.zarr.draft", ".a.zarr.notes.draft"]
    for name in (".a.zarr.0123abcd.draft", ".a.zarr.ffffffff.draft", *kept):
        (tmp_path / name / "outputs").mkdir(parents=True)

    new_campaign(tmp_path / "a.zarr")

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "a.zarr"])


def test_a_name_with_wildcards_sweeps_only_its_own(tmp_path: Path, new_campaign: NewCampaign) -> None:
    (tmp_path / ".ab.0123abcd.draft").mkdir()

    new_campaign(tmp_path / "a[b]")
    new_campaign(tmp_path / "a*")

    assert sorted(p.name for p in tmp_path.iterdir()) == [".ab.0123abcd.draft", "a*", "a[b]"]


def test_the_slower_of_two_makers_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_campaign: NewCampaign
) -> None:
    whole = stores.format.groups._consolidate

    def overtaken(target: Any) -> None:
        whole(target)
        monkeypatch.setattr(stores.format.groups, "_consolidate", whole)
        new_campaign(tmp_path / "a", rows=3)  # the other program is faster, and sweeps our draft

    monkeypatch.setattr(stores.format.groups, "_consolidate", overtaken)

    with pytest.raises(StoreExistsError) as raised:
        new_campaign(tmp_path / "a")

    assert str(raised.value) == f"Something appeared at {tmp_path / 'a'} meanwhile. Choose another path."
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert CampaignStore.open(tmp_path / "a").rows == 3


def test_a_store_can_be_moved(tmp_path: Path, campaign: CampaignStore) -> None:
    shutil.copytree(str(campaign.location), tmp_path / "copy")

    moved = CampaignStore.open(tmp_path / "copy")

    np.testing.assert_array_equal(moved.outputs[:], campaign.outputs[:])
    assert moved.fingerprint == campaign.fingerprint
