"""Copies: whole or not at all, made from the blocks as they are now, and never believed against them."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from coar.cli.app import main
from coar.cli.compact import compact
from stores import (
    AttributionStore,
    CampaignStore,
    DamagedBlockError,
    StoreError,
    StoreNotFoundError,
    UnfinishedStoreError,
)
from stores.blocks.copies import Copies, damaged_files
from stores.format.groups import Location
from stores.maintenance.compact import CopyError, MadeCopy, make_copies, remove_copies
from stores.storage import objects

Arrays = dict[str, npt.NDArray[Any]]
NewCampaign = Callable[..., CampaignStore]
Keep = npt.NDArray[np.bool_]
Outputs = npt.NDArray[np.float32]


@pytest.fixture
def own_campaign(tmp_path: Path, campaign: CampaignStore) -> Path:
    """A finished campaign, to be changed."""
    return Path(shutil.copytree(str(campaign.location), tmp_path / "campaign.zarr"))


@pytest.fixture
def own_attributions(tmp_path: Path, attributions: AttributionStore) -> Path:
    """Finished attributions, to be changed."""
    return Path(shutil.copytree(str(attributions.location), tmp_path / "attributions.zarr"))


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory, attributions: AttributionStore) -> AttributionStore:
    """Attributions with both copies. Not to be written to."""
    place = tmp_path_factory.mktemp("copied") / "a"
    shutil.copytree(str(attributions.location), place)
    make_copies(place)
    return AttributionStore.open(place)


def _files(place: Path) -> dict[str, bytes]:
    return {file.relative_to(place).as_posix(): file.read_bytes() for file in place.rglob("*") if file.is_file()}


def _copy(location: Location, kind: type[CampaignStore] | type[AttributionStore]) -> Copies:
    store = kind.open(location)
    return Copies(store.blocks, ["outputs"] if kind is CampaignStore else ["weights", "stderr"])


def _only(place: Path, pattern: str) -> Path:
    (found,) = place.glob(pattern)
    return found


@given(
    rows=st.one_of(st.integers(-7, 6), st.just(slice(None))),
    columns=st.one_of(st.integers(-3, 2), st.just(slice(None))),
)
def test_what_is_read_is_what_was_written(copied: AttributionStore, estimates: Arrays, rows: Any, columns: Any) -> None:
    np.testing.assert_array_equal(copied.weights[rows, columns], estimates["weights"][rows, columns], strict=True)
    np.testing.assert_array_equal(copied.stderr[rows, columns], estimates["stderr"][rows, columns], strict=True)


def test_a_column_comes_from_the_copy_and_a_block_from_the_blocks(
    copied: AttributionStore, estimates: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies(copied.blocks, ["weights"])
    column = copies.take("weights", slice(0, 7), np.array([1]))

    assert column is not None
    np.testing.assert_array_equal(column, estimates["weights"][:, [1]])
    assert copies.take("weights", slice(3, 6), slice(0, 3)) is None, "one block is as good as any copy"

    store = AttributionStore.open(copied.location)
    monkeypatch.setattr(store.blocks, "take", None)  # would fail if asked
    np.testing.assert_array_equal(store.weights[:, 1], estimates["weights"][:, 1])


def test_the_blocks_and_the_metadata_stay_as_they_were(own_campaign: Path, outputs: Outputs) -> None:
    before = _files(own_campaign)

    assert make_copies(own_campaign) == [MadeCopy("column", 1, 224, True)]

    after = _files(own_campaign)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"copies"}
    dataset = xarray.open_zarr(str(own_campaign))  # a warning would be an error here
    assert set(dataset) == {"outputs", "keep", "ledger"}
    np.testing.assert_array_equal(dataset["outputs"].to_numpy(), outputs)
    np.testing.assert_array_equal(CampaignStore.open(own_campaign).outputs[:, 2], outputs[:, 2])
    folder = _only(own_campaign, "copies/column-*")
    array = zarr.open_array(str(folder / "outputs"), mode="r")
    assert array.metadata.dimension_names == ("keep_rows", "examples")  # type: ignore[union-attr]
    copy = xarray.open_zarr(str(own_campaign), group=folder.relative_to(own_campaign).as_posix(), consolidated=False)
    np.testing.assert_array_equal(copy["outputs"].to_numpy(), outputs)


def test_making_them_again_changes_nothing(own_attributions: Path) -> None:
    first = make_copies(own_attributions, ["column"])
    before = _files(own_attributions)

    assert [copy.made for copy in first] == [True]
    assert [(copy.kind, copy.made) for copy in make_copies(own_attributions)] == [("row", True), ("column", False)]
    after = _files(own_attributions)
    assert {name: after[name] for name in before} == before
    assert [copy.made for copy in make_copies(own_attributions)] == [False, False]


def test_bytes_are_told_as_they_are_done(own_attributions: Path) -> None:
    told: list[tuple[int, int]] = []

    make_copies(own_attributions, on_bytes=lambda done, total: told.append((done, total)))

    blocks = 4 * (2 * 7 * 3 + 5 * 7)
    assert {total for _, total in told} == {blocks + 2 * 2 * 4 * 7 * 3}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == told[-1][1]


@pytest.mark.faults
def test_one_that_was_stopped_is_not_there_and_is_made_by_the_next_try(own_attributions: Path, tmp_path: Path) -> None:
    shutil.copytree(own_attributions, tmp_path / "other")
    make_copies(tmp_path / "other")

    class Stopped(BaseException):
        """As a kill would: no error of any library."""

    # while checking; in the row copy; in the column copy; before the mark of the column copy
    for stop, complete in ((2, []), (4, []), (6, ["row"]), (99, ["row"])):
        calls = 0

        def count(done: int, total: int, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop or done == total:
                raise Stopped

        with pytest.raises(Stopped):
            make_copies(own_attributions, on_bytes=count)
        marks = own_attributions.glob("copies/*/zarr.json")
        assert [mark.parent.name.split("-")[0] for mark in marks] == complete
        store = AttributionStore.open(own_attributions)
        np.testing.assert_array_equal(store.weights[:, 1], AttributionStore.open(tmp_path / "other").weights[:, 1])

    make_copies(own_attributions)

    assert _files(own_attributions) == _files(tmp_path / "other")
    assert damaged_files(AttributionStore.open(own_attributions).blocks) == []


@pytest.mark.faults
def test_two_at_once_make_one_copy(own_attributions: Path, tmp_path: Path) -> None:
    shutil.copytree(own_attributions, tmp_path / "other")
    make_copies(tmp_path / "other")
    inner = False

    def second(done: int, total: int) -> None:  # another program makes the same copies between any two steps
        nonlocal inner
        if not inner:
            inner = True
            make_copies(own_attributions)
            inner = False

    make_copies(own_attributions, on_bytes=second)

    assert _files(own_attributions) == _files(tmp_path / "other")


def test_another_memory_budget_begins_anew(
    own_campaign: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stores.maintenance.compact.SHARD_BYTES", 10 * 4)  # a file for each column
        patch.setattr("stores.format.layout.COPY_BYTES", 10 * 4)
        with pytest.raises(KeyboardInterrupt):
            make_copies(own_campaign, on_bytes=stop)
    assert len(list(own_campaign.glob("copies/column-*/outputs/c/0/*"))) == 5

    assert make_copies(own_campaign) == [MadeCopy("column", 1, 224, True)]
    assert [file.name for file in own_campaign.glob("copies/column-*/outputs/c/0/*")] == ["0"]
    np.testing.assert_array_equal(CampaignStore.open(own_campaign).outputs[:, 2], outputs[:, 2])


def test_a_mark_that_names_files_elsewhere_is_no_mark(own_campaign: Path) -> None:
    make_copies(own_campaign)
    mark = _only(own_campaign, "copies/column-*/zarr.json")
    good = json.loads(mark.read_text())["attributes"]
    for bad in (
        good | {"files": {"outputs/c/0/0": "00"}},
        good | {"files": {f"copies/{mark.parent.name}/../../../elsewhere": "00"}},
        good | {"files": ["a"]},
        good | {"source": "0" * 64},
        [good],
    ):
        mark.write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": bad}))
        assert _copy(own_campaign, CampaignStore).take("outputs", slice(0, 10), np.array([1])) is None
        assert damaged_files(CampaignStore.open(own_campaign).blocks) == []


def test_a_store_that_is_open_for_writing_has_none(own_campaign: Path) -> None:
    make_copies(own_campaign)
    writable = Copies(CampaignStore.open(own_campaign, mode="r+").blocks, ["outputs"])

    assert writable.take("outputs", slice(0, 10), np.array([1])) is None
    assert _copy(own_campaign, CampaignStore).take("outputs", slice(0, 10), np.array([1])) is not None


def test_a_copy_of_what_was_repaired_since_is_not_read(own_campaign: Path, keep: Keep, outputs: Outputs) -> None:
    make_copies(own_campaign)
    old = _only(own_campaign, "copies/column-*")
    store = CampaignStore.open(own_campaign, mode="r+")
    store.blocks.forget(1)
    assert _copy(own_campaign, CampaignStore).take("outputs", slice(0, 10), np.array([1])) is None
    store.write_block(1, keep[4:8], outputs[4:8] + 1)

    changed = outputs.copy()
    changed[4:8] += 1
    np.testing.assert_array_equal(CampaignStore.open(own_campaign).outputs[:, 1], changed[:, 1])

    make_copies(own_campaign)
    assert not old.exists()
    assert _only(own_campaign, "copies/column-*") != old
    np.testing.assert_array_equal(CampaignStore.open(own_campaign).outputs[:, 1], changed[:, 1])


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["lost", "emptied", "cut", "flipped", "no metadata", "other metadata"])
def test_a_damaged_copy_is_told_and_the_blocks_are_read(own_campaign: Path, outputs: Outputs, damage: str) -> None:
    make_copies(own_campaign)
    folder = _only(own_campaign, "copies/column-*") / "outputs"
    file = folder / ("zarr.json" if "metadata" in damage else "c/0/0")
    data = file.read_bytes()
    if damage in ("lost", "no metadata"):
        file.unlink()
    elif damage == "other metadata":
        file.write_bytes(json.dumps(json.loads(data) | {"shape": [10, 4]}).encode())
    else:
        flipped = bytes([data[0] ^ 8]) + data[1:]
        file.write_bytes({"emptied": b"", "cut": data[:-3], "flipped": flipped}[damage])
    store = CampaignStore.open(own_campaign)

    with pytest.warns(
        UserWarning, match=r"the copy copies/column-\w+/outputs is damaged \(.*\); the blocks it was made"
    ) as told:
        np.testing.assert_array_equal(store.outputs[:, 1], outputs[:, 1])
    assert len(told) == 1
    np.testing.assert_array_equal(store.outputs[:, 2], outputs[:, 2])  # told once
    if "metadata" not in damage:
        assert damaged_files(store.blocks) == [file.relative_to(own_campaign).as_posix()]

    assert remove_copies(own_campaign) == 1
    make_copies(own_campaign)
    np.testing.assert_array_equal(CampaignStore.open(own_campaign).outputs[:, 1], outputs[:, 1])


@pytest.mark.faults
def test_a_damaged_store_is_not_copied(own_campaign: Path) -> None:
    swapped = own_campaign / "outputs/c/1/0"
    swapped.write_bytes((own_campaign / "outputs/c/0/0").read_bytes())  # whole and healthy: only the sha256 knows

    with pytest.raises(DamagedBlockError, match=r"block 1 \(rows 4 to 7\) is damaged: its sha256 is not"):
        make_copies(own_campaign)
    assert not (own_campaign / "copies").exists()


def test_an_unfinished_store_is_refused(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    store = new_campaign(tmp_path / "a")
    store.write_block(1, keep[4:8], outputs[4:8])

    with pytest.raises(UnfinishedStoreError, match=r"2 of 3 blocks are not finished \(0, 2\)"):
        make_copies(tmp_path / "a")
    assert not (tmp_path / "a" / "copies").exists()


def test_unfinished_attributions_are_refused(tmp_path: Path, new_attributions: Callable[..., AttributionStore]) -> None:
    new_attributions(tmp_path / "a")

    with pytest.raises(UnfinishedStoreError, match="only 0 of 3 blocks of examples are estimated"):
        make_copies(tmp_path / "a")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"copies": ["rows"]}, "No kind of copy 'rows'; kinds are row and column."),
        ({"copies": []}, "copies is empty, expected row, column or both."),
        ({"memory": 2**20}, "memory is 1,048,576 bytes, expected at least 67,108,864."),
    ],
)
def test_wrong_wishes_are_named(own_campaign: Path, given: dict[str, Any], text: str) -> None:
    with pytest.raises(CopyError) as raised:
        make_copies(own_campaign, **given)
    assert str(raised.value) == text


def test_a_full_disk_is_told_before_anything_is_written(own_campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage())

    with pytest.raises(CopyError, match=r"campaign.zarr: the copies need 0\.0 GiB, but 0\.0 GiB are free there"):
        make_copies(own_campaign)
    assert not (own_campaign / "copies").exists()


def test_nothing_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="nothing is there"):
        make_copies(tmp_path / "a")


def test_a_memory_store_works_too(new_campaign: NewCampaign, keep: Keep, outputs: Outputs) -> None:
    memory = MemoryStore()
    store = new_campaign(memory)
    for block in range(3):
        store.write_block(block, keep[store.span(block)], outputs[store.span(block)])

    make_copies(memory, "row")
    make_copies(memory, "column")

    found = CampaignStore.open(memory.with_read_only(True))
    column = Copies(found.blocks, ["outputs"]).take("outputs", slice(0, 10), np.array([4]))
    assert column is not None
    np.testing.assert_array_equal(column[:, 0], outputs[:, 4])
    assert remove_copies(memory) == 2
    assert not [key for key in memory._store_dict if key.startswith(("copies/row", "copies/column"))]


def _wide(place: Path, new_campaign: NewCampaign, examples: int) -> Path:
    store = new_campaign(place, 256, 64, components=8, examples=examples)
    outputs = np.random.default_rng(0).standard_normal((64, examples), dtype=np.float32)
    for block in range(4):
        store.write_block(block, np.ones((64, 8), dtype=bool), outputs)
    return place


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(tmp_path: Path, new_campaign: NewCampaign) -> None:
    peaks = []
    for examples in (20_000, 80_000):  # 20 and 82 MB of outputs; 5 and 20 MB of a block, which is checked as a whole
        place = _wide(tmp_path / str(examples), new_campaign, examples)
        tracemalloc.start()
        try:
            make_copies(place, ["row", "column"], memory=64 * 2**20)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    assert peaks[1] < 64 * 2**20 + 4 * 4 * 64 * 80_000
    assert peaks[1] < 82e6


def test_the_command_makes_and_removes_them(own_attributions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact(str(own_attributions), copies="column, row", quiet=True)
    assert capsys.readouterr().out.splitlines() == [
        f"row copy made and checked: 2 files, 0.0 MiB in {own_attributions}",
        f"column copy made and checked: 2 files, 0.0 MiB in {own_attributions}",
    ]
    compact(str(own_attributions), copies="row", quiet=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["copies"] == [{"kind": "row", "files": 2, "bytes": found["copies"][0]["bytes"], "made": False}]
    compact(str(own_attributions), remove=True)
    assert capsys.readouterr().out == f"2 copies removed from {own_attributions}.\n"
    assert list((own_attributions / "copies").glob("row-*")) == []


def test_other_bytes_than_were_written_are_told(own_campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = objects.replace

    def faulty(store: Store, key: str, data: bytes) -> None:
        replace(store, key, data[:-9] + b"x" + data[-8:] if "/c/" in key else data)

    monkeypatch.setattr(objects, "replace", faulty)

    with pytest.raises(
        StoreError, match=r"storage gave back other bytes than were written to copies/column-\w+/outputs"
    ):
        make_copies(own_campaign)
    assert list(own_campaign.glob("copies/*/zarr.json")) == []


@pytest.mark.parametrize(
    ("finished", "copies", "code", "text"),
    [(3, "rows", 2, "No kind of copy 'rows'"), (2, "column", 3, "1 of 3 blocks are not finished"), (3, "row", 0, "")],
)
def test_exit_codes_say_what_happened(
    tmp_path: Path,
    new_campaign: NewCampaign,
    keep: Keep,
    outputs: Outputs,
    finished: int,
    copies: str,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = new_campaign(tmp_path / "a")
    for block in range(finished):
        store.write_block(block, keep[store.span(block)], outputs[store.span(block)])
    monkeypatch.setattr(sys, "argv", ["coar", "compact", str(tmp_path / "a"), "--copies", copies, "--quiet"])

    with pytest.raises(SystemExit) as raised:
        main()

    assert raised.value.code == code
    assert text in capsys.readouterr().err
