"""`verify` names every damaged file of a store, `repair` forgets exactly what is damaged: the rest stays as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from zarr.storage import LocalStore, MemoryStore

import stores
from stores import (
    AttributionStore,
    CampaignStore,
    DamagedBlockError,
    StoreBusyError,
    StoreNotFoundError,
    StoreUnreadableError,
)
from stores.maintenance.verify import Report, fixed_size
from stores.opening import open_any
from stores.records import Process, WorkerRecord
from stores.storage import objects
from stores.work.worker import Worker

pytestmark = pytest.mark.faults

Arrays = dict[str, npt.NDArray[Any]]
Keep = npt.NDArray[np.bool_]
Outputs = npt.NDArray[np.float32]
NewCampaign = Callable[..., CampaignStore]

READ = "10 rows (0.0 MiB) were read back and fit their sha256"


@pytest.fixture
def copy(tmp_path: Path, campaign: CampaignStore) -> Path:
    """A copy of the finished campaign (blocks of 4, 4 and 2 rows), to damage, that a worker has written."""
    shutil.copytree(str(campaign.location), tmp_path / "a")
    with Worker(LocalStore(tmp_path / "a"), {"threads": 1}):
        pass
    return tmp_path / "a"


def _files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _flip(file: Path, at: int = -9) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_a_sound_store(campaign: CampaignStore) -> None:
    before = _files(Path(campaign.where))
    seen: list[tuple[int, int]] = []

    report = stores.verify(campaign.location, on_block=lambda done, total: seen.append((done, total)))

    size = 10 * 5 * 4 + 10 * 2  # outputs and packed keep-vectors
    assert report == Report(campaign.where, "campaign", 2, 3, 3, 10, size, (), (), ())
    assert report.sound
    assert report.text() == f"{campaign.where}: sound. 3 of 3 blocks are finished; {READ}."
    assert json.loads(json.dumps(report.as_dict()))["sound"] is True
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert _files(Path(campaign.where)) == before


def test_a_sound_store_of_attributions(attributions: AttributionStore) -> None:
    report = stores.verify(attributions.location)

    assert (report.kind, report.blocks, report.finished, report.rows, report.sound) == ("attributions", 3, 3, 7, True)
    assert "7 examples" in report.text()
    assert stores.repair(attributions.location).text() == f"{attributions.where}: nothing to repair."


def test_an_unfinished_store_is_sound(tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs) -> None:
    store = new_campaign(tmp_path / "a")
    store.write_block(1, keep[4:8], outputs[4:8])

    report = stores.verify(tmp_path / "a")

    assert (report.sound, report.finished, report.blocks, report.rows) == (True, 1, 3, 4)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0\0")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (Path.unlink, "the file is gone"),
        (_empty, "the file is empty"),
        (_cut, "the file was cut: {less} bytes, expected {size}"),
        (_lengthen, "the file was made longer: {more} bytes, expected {size}"),
        (_flip, "the file's bytes were changed ("),
    ],
)
@pytest.mark.parametrize("name", ["outputs", "keep"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_damaged_file_is_named_and_only_its_block_is_forgotten(
    copy: Path, campaign: CampaignStore, damage: Callable[[Path], None], why: str, name: str, block: int
) -> None:
    before = _files(copy)
    file = copy / name / "c" / str(block) / "0"
    size = file.stat().st_size
    damage(file)

    report = stores.verify(copy)

    (found,) = report.damages
    assert (found.what, found.block, found.files) == ("block", block, (str(file),))
    assert found.why.startswith(why.format(size=size, less=size - 5, more=size + 2))
    assert str(found) == f"block {block}: {found.why}: {file}"
    assert report.text().splitlines()[-1] == (
        f"`coar repair {copy}` forgets what is damaged; then run the same command again to make it anew."
    )

    repair = stores.repair(copy)

    gone = {f"{array}/c/{block}/0" for array in ("outputs", "keep", "ledger")}
    assert repair.forgotten == (block,)
    assert (repair.rewritten, repair.removed, repair.left) == ((), (), ())
    assert _files(copy) == {key: data for key, data in before.items() if key not in gone}
    assert stores.verify(copy).sound
    store = CampaignStore.open(copy, mode="r+")
    assert store.missing_blocks() == [block]
    store.write_block(block, *campaign.read_block(block))
    assert _files(copy) == before


@pytest.mark.parametrize("length", [0, 5, 31, 33])
def test_a_mark_of_another_length_is_damage(copy: Path, length: int) -> None:
    mark = copy / "ledger" / "c" / "1" / "0"
    mark.write_bytes((mark.read_bytes() * 2)[:length])

    (found,) = stores.verify(copy).damages

    assert (found.block, found.files, found.why) == (1, (str(mark),), f"the mark has {length} bytes, expected 32")
    assert stores.repair(copy).forgotten == (1,)
    assert CampaignStore.open(copy).missing_blocks() == [1]


def test_a_changed_mark_and_swapped_files_name_all_that_may_be_wrong(copy: Path) -> None:
    _flip(copy / "ledger" / "c" / "2" / "0")
    one, other = copy / "keep" / "c" / "0" / "0", copy / "keep" / "c" / "1" / "0"
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1])
    other.write_bytes(data[0])

    damages = stores.verify(copy).damages

    why = "the data do not fit their mark (its sha256 is not the one in the ledger)"
    assert [(found.block, found.why) for found in damages] == [(0, why), (1, why), (2, why)]
    assert damages[2].files == tuple(str(copy / name / "c" / "2" / "0") for name in ("ledger", "outputs", "keep"))


def test_several_damages_of_a_block_are_all_named(copy: Path) -> None:
    shutil.rmtree(copy / "outputs" / "c")
    _empty(copy / "keep" / "c" / "1" / "0")

    report = stores.verify(copy)

    assert [found.block for found in report.damages] == [0, 1, 1, 2]
    assert report.damaged_blocks == [0, 1, 2]
    assert stores.repair(copy).forgotten == (0, 1, 2)
    assert stores.verify(copy).text() == (
        f"{copy}: sound. 0 of 3 blocks are finished; 0 rows (0.0 MiB) were read back and fit their sha256."
    )


def test_data_without_a_mark_are_left_over_not_damage(copy: Path) -> None:
    (copy / "ledger" / "c" / "1" / "0").unlink()
    (copy / "outputs" / "c" / "9").mkdir()
    (copy / "outputs" / "c" / "9" / "0").write_bytes(b"of no block")
    (copy / "outputs" / "c" / "1" / "0.abcd.partial").write_bytes(b"killed")

    report = stores.verify(copy)

    assert report.sound
    assert report.leftovers == ("keep/c/1/0", "outputs/c/1/0", "outputs/c/9/0")
    assert report.partials == ("outputs/c/1/0.abcd.partial",)
    assert report.text().splitlines()[1:] == [
        "3 files of unfinished work are there: harmless, never read as data.",
        "1 file of writes in between is there: harmless, never read as data.",
    ]
    assert stores.repair(copy).removed == (*report.leftovers, *report.partials)
    assert stores.verify(copy) == replace(report, leftovers=(), partials=())


def test_what_writers_without_a_record_leave_stays_for_a_day(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    store = new_campaign(tmp_path / "a")  # `coar fit` writes without being a worker
    store.write_block(1, keep[4:8], outputs[4:8])
    (tmp_path / "a" / "ledger" / "c" / "1" / "0").unlink()
    partials = [tmp_path / "a" / "outputs" / "c" / "1" / f"0.{name}.partial" for name in ("new", "old", "future")]
    for age, partial in zip((0, 90_000, -90_000), partials, strict=True):
        partial.write_bytes(b"half")
        os.utime(partial, (partial.stat().st_mtime - age,) * 2)

    assert stores.repair(tmp_path / "a").removed == ("outputs/c/1/0.old.partial",)
    assert [partial.exists() for partial in partials] == [True, False, True]
    assert (tmp_path / "a" / "outputs" / "c" / "1" / "0").exists()


def test_a_damaged_column_is_named_and_beyond_repair(copy: Path) -> None:
    label, name = copy / "examples" / "label" / "c" / "0", copy / "components" / "name" / "c" / "0"
    _flip(label)
    name.unlink()
    _flip(copy / "keep" / "c" / "0" / "0")

    report = stores.verify(copy)

    tables = [found for found in report.damages if found.what == "table"]
    assert [found.files for found in tables] == [(str(name),), (str(label),)]
    assert tables[0].why == "the column components/name cannot be read: its file is gone"
    assert report.text().splitlines()[-1] == (
        "Damaged tables cannot be repaired: restore the store from a copy, or run again into a new one."
    )
    repair = stores.repair(copy)
    assert repair.forgotten == (0,)
    assert repair.left == tuple(tables)
    assert repair.text().splitlines()[-1] == "Restore the store from a copy, or run again into a new one."


@pytest.mark.parametrize("name", ["outputs", "ledger", "examples", "examples/id"])
def test_metadata_of_an_array_are_written_anew_from_the_root(copy: Path, name: str) -> None:
    file = copy / name / "zarr.json"
    before = _files(copy)
    node = json.loads(file.read_text())
    for data in (b"", b"{", b"[]", json.dumps({**node, "attributes": {"x": 1}}).encode(), None):
        file.unlink() if data is None else file.write_bytes(data)

        (found,) = stores.verify(copy).damages
        assert (found.what, found.files) == ("metadata", (str(file),))
        assert found.why == ("the metadata are gone" if data is None else "the metadata are not what the root says")

        assert stores.repair(copy).rewritten == (str(file),)
        assert json.loads(file.read_text()) == {k: v for k, v in node.items() if k != "consolidated_metadata"}
        file.write_bytes(before[f"{name}/zarr.json"])
        assert stores.verify(copy).sound


def test_a_damaged_root_is_named_and_beyond_repair(copy: Path) -> None:
    root = copy / "zarr.json"
    good = root.read_bytes()
    for data in (b"", good[:-2], good.replace(b"by hand", b"by hend"), good.replace(b'"keep"', b'"kept"')):
        root.write_bytes(data)
        for look in (stores.verify, stores.repair):
            with pytest.raises(
                StoreUnreadableError, match=f"^{copy}.* restore it from a copy, or delete it and run again"
            ):
                look(copy)
    root.unlink()
    with pytest.raises(StoreUnreadableError, match=r"it has no zarr\.json"):
        stores.verify(copy)


def test_nothing_there(tmp_path: Path) -> None:
    for look in (stores.verify, stores.repair, stores.migrate):
        with pytest.raises(StoreNotFoundError, match="nothing is there"):
            look(tmp_path / "none")


def _record(store: Path, **changes: Any) -> WorkerRecord:
    """Writes the record of a worker of another machine, running; returns it."""
    process = Process("elsewhere", 7, "another start of another machine", "1")
    record = WorkerRecord("w", process, "2026-01-01", "2026-01-01", {}, lease_seconds=0.4, **changes)
    objects.replace(LocalStore(store), "work/workers/w.json", objects.to_json(asdict(record)))
    return record


def test_a_store_that_a_worker_of_this_machine_is_at_is_not_repaired(copy: Path) -> None:
    _empty(copy / "keep" / "c" / "0" / "0")
    (copy / "ledger" / "c" / "1" / "0").unlink()
    with Worker(LocalStore(copy), {}) as worker:
        with pytest.raises(StoreBusyError) as raised:
            stores.repair(copy)
        assert str(raised.value) == (
            f"{copy}: 1 worker is at it ({worker.id}). Wait for them or stop them first. With --force (force=True) it "
            "is repaired all the same."
        )
        with pytest.raises(DamagedBlockError, match="block 0"):
            CampaignStore.open(copy)
        repair = stores.repair(copy, force=True)
        assert (repair.forgotten, repair.removed) == ((0,), ())  # what looks left over may be the worker's
    assert stores.repair(copy).removed == ("keep/c/1/0", "outputs/c/1/0")


def test_a_worker_of_another_machine_is_watched(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _record(copy)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            _record(copy, beat=1)

    with monkeypatch.context() as patch:
        patch.setattr("stores.work.liveness.time.sleep", nap)
        with pytest.raises(StoreBusyError, match=r"1 worker is at it \(w\)"):
            stores.repair(copy)
    assert len(naps) == 3

    stores.repair(copy)  # its heart beats no more: dead, however its clock or ours is set


@pytest.mark.parametrize("state", ["ended", "stopped"])
def test_a_worker_that_has_ended_is_not_watched(copy: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    _record(copy, state=state)
    monkeypatch.setattr("stores.work.liveness.time.sleep", lambda _: pytest.fail("watched"))
    stores.repair(copy)


def test_copies_that_no_longer_fit_are_removed(copy: Path) -> None:
    from stores.maintenance.compact import make_copies

    make_copies(copy)
    (folder,) = (copy / "copies").glob("column-*")
    assert stores.verify(copy).sound
    assert stores.repair(copy).removed == ()
    file = next(folder.glob("outputs/c/*/*"))
    _flip(file)

    (found,) = stores.verify(copy).damages
    assert (found.what, found.files, found.why) == ("copy", (str(file),), "a copy for fast reading is damaged")
    repair = stores.repair(copy)
    assert (repair.forgotten, repair.removed) == ((), (f"copies/{folder.name}",))
    assert not folder.exists()
    assert stores.verify(copy).sound


@pytest.mark.parametrize("damage", [_empty, _flip])
@pytest.mark.parametrize("name", ["ledger", "outputs"])
def test_copies_of_a_block_that_is_forgotten_go_too(copy: Path, damage: Callable[[Path], None], name: str) -> None:
    from stores.maintenance.compact import make_copies

    make_copies(copy)
    (folder,) = (copy / "copies").glob("column-*")
    damage(copy / name / "c" / "1" / "0")

    repair = stores.repair(copy)

    assert (repair.forgotten, repair.removed) == ((1,), (f"copies/{folder.name}",))
    assert not folder.exists()


def test_a_memory_store_is_looked_after_too(new_campaign: NewCampaign, keep: Keep, outputs: Outputs) -> None:
    memory = MemoryStore()
    store = new_campaign(memory)
    for block in range(3):
        store.write_block(block, keep[store.span(block)], outputs[store.span(block)])
    assert stores.verify(memory).sound
    objects.replace(memory, "keep/c/1/0", b"noise")

    assert stores.repair(memory).forgotten == (1,)
    assert CampaignStore.open(memory).missing_blocks() == [1]


def test_sizes_are_known_where_nothing_is_compressed(campaign: CampaignStore, attributions: AttributionStore) -> None:
    for store in (campaign, attributions):
        opened = open_any(store.location)
        for name, array in opened.blocks.arrays.items():
            file = Path(store.where) / opened.blocks._file(name, 1)
            assert fixed_size(array) == file.stat().st_size, name
    assert fixed_size(campaign._group["examples/id"]) is None  # type: ignore[arg-type]


def test_links_are_not_followed_out_of_the_store(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    thesis = tmp_path / "elsewhere" / "thesis.partial"
    thesis.write_text("mine")
    (copy / "outputs" / "c" / "link").symlink_to(tmp_path / "elsewhere")
    (copy / "copies").symlink_to(tmp_path / "elsewhere")
    _empty(copy / "keep" / "c" / "0" / "0")

    stores.repair(copy)

    assert thesis.read_text() == "mine"
