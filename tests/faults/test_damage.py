"""Damage to a finished campaign: it is named, never read as data, and following the advice repairs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ablate
import stores
from stores import CampaignStore, DamagedBlockError, StoreError, UnfinishedStoreError
from stores.blocks.copies import Copies
from stores.maintenance.compact import make_copies

pytestmark = pytest.mark.faults

Files = Callable[[Path], dict[str, bytes]]
SmallSpec = Callable[..., ablate.CampaignSpec]
Unfinish = Callable[..., None]

FULL, ODD = 1, 5  # a block of 7 rows, and the last one of 5, whose file is not full


def _path(store: CampaignStore) -> Path:
    return Path(str(store.location))


def _file(store: CampaignStore, name: str, block: int) -> Path:
    return _path(store) / name / "c" / str(block) / "0"


def _reads(store: CampaignStore, name: str, block: int) -> list[Callable[[], Any]]:
    """Every way to read something of a block."""
    view, first = getattr(store, name), store.span(block).start
    return [
        lambda: view[:],
        lambda: view[first],
        lambda: view[[0, first + 1]],
        lambda: view[:, 2],
        lambda: list(view),
        lambda: store.read_block(block),
        lambda: store.read_keep(block) if name == "keep" else store.read_outputs(block, slice(0, 2)),
    ]


@pytest.mark.parametrize("name", ["outputs", "keep"])
@pytest.mark.parametrize("block", [FULL, ODD])
@pytest.mark.parametrize(("damage", "reason"), [("lost", "gone"), ("emptied", "empty")])
def test_a_mark_without_its_file_is_named_at_open_and_repaired_as_advised(
    finished: CampaignStore,
    undisturbed: Path,
    small_spec: SmallSpec,
    files: Files,
    name: str,
    block: int,
    damage: str,
    reason: str,
) -> None:
    path = _path(finished)
    _file(finished, name, block).unlink()
    if damage == "emptied":  # what a power cut leaves of a file that was not yet on the disk
        _file(finished, name, block).write_bytes(b"")

    rows = "7 to 13" if block == FULL else "35 to 39"
    text = (
        f"{path}: block {block} (rows {rows}) is damaged: the file of '{name}' is {reason} ({name}/c/{block}/0). "
        f"`coar repair {path}` forgets it; then run the same command again to recompute it."
    )
    with pytest.raises(DamagedBlockError) as raised:
        CampaignStore.open(path)
    assert str(raised.value) == text
    with pytest.raises(DamagedBlockError) as raised:
        ablate.run(small_spec(), path, progress=False)
    assert str(raised.value) == text
    for read in _reads(finished, name, block):  # opened before the damage
        with pytest.raises(DamagedBlockError, match=f"block {block} .* is damaged"):
            read()

    repaired = stores.repair(path)
    assert repaired.forgotten == (block,)
    assert repaired.found.damages[0].files == (str(_file(finished, name, block)),)
    ablate.run(small_spec(), path, progress=False)
    assert files(path) == files(undisturbed)


@pytest.mark.parametrize("name", ["outputs", "keep"])
@pytest.mark.parametrize("block", [FULL, ODD])
def test_cuts_and_flipped_bytes_are_noticed(finished: CampaignStore, name: str, block: int) -> None:
    file = _file(finished, name, block)
    good = file.read_bytes()
    bad = [good[:length] for length in range(len(good))] + [good + b"\0", bytes(len(good))]
    bad += [good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :] for i in range(len(good))]
    bad = bad if name == "keep" else bad[:: 3 if block == FULL else 7]  # all of the small file, a sample of the large
    view, first = getattr(finished, name), finished.span(block).start

    for data in bad:
        file.write_bytes(data)
        with pytest.raises(DamagedBlockError, match=rf"block {block} \(rows {first} to \d+\) is damaged: "):
            view[first + 2]
    for data in bad[::13]:
        file.write_bytes(data)
        for read in _reads(finished, name, block):
            with pytest.raises(DamagedBlockError, match=rf"block {block} \(rows {first} to \d+\) is damaged: "):
                read()
    file.write_bytes(good)
    for read in _reads(finished, name, block):
        read()


def test_damage_in_one_block_leaves_the_others_readable(finished: CampaignStore, undisturbed: Path) -> None:
    whole = CampaignStore.open(undisturbed)
    _file(finished, "outputs", FULL).write_bytes(b"noise")

    np.testing.assert_array_equal(finished.outputs[:7], whole.outputs[:7])
    np.testing.assert_array_equal(finished.outputs[[39, 14]], whole.outputs[[39, 14]])
    np.testing.assert_array_equal(finished.keep[:], whole.keep[:])
    np.testing.assert_array_equal(finished.read_keep(FULL), whole.read_keep(FULL))


@pytest.mark.parametrize("names", [("outputs",), ("keep",), ("outputs", "keep")])
def test_swapped_blocks_are_noticed_by_their_sha256(finished: CampaignStore, names: tuple[str, ...]) -> None:
    for name in names:
        one, other = (_file(finished, name, block) for block in (FULL, 2))
        one_data, other_data = one.read_bytes(), other.read_bytes()
        one.write_bytes(other_data)
        other.write_bytes(one_data)

    for block in (FULL, 2):
        with pytest.raises(
            DamagedBlockError, match=rf"block {block} .* its sha256 is not the one in the ledger\. `coar repair"
        ):
            finished.read_block(block)
    finished.read_block(0)


def test_data_without_a_mark_are_not_data(
    finished: CampaignStore, undisturbed: Path, small_spec: SmallSpec, files: Files, unfinish: Unfinish
) -> None:
    path = _path(finished)
    unfinish(path, [FULL, ODD])

    store = CampaignStore.open(path)
    rows = [*range(7), *range(14, 35)]
    assert store.finished_rows.tolist() == rows
    np.testing.assert_array_equal(store.outputs[:], CampaignStore.open(undisturbed).outputs[rows])
    assert len(store.keep) == len(rows)
    for block in (FULL, ODD):
        with pytest.raises(UnfinishedStoreError, match=f"block {block} is not finished"):
            store.read_block(block)

    ablate.run(small_spec(), path, progress=False)
    assert files(path) == files(undisturbed)


@pytest.mark.parametrize("block", [FULL, ODD])
@pytest.mark.parametrize("data", [b"", b"half a file"])
def test_what_an_unfinished_block_left_does_not_matter(
    finished: CampaignStore,
    undisturbed: Path,
    small_spec: SmallSpec,
    files: Files,
    unfinish: Unfinish,
    block: int,
    data: bytes,
) -> None:
    path = _path(finished)
    unfinish(path, [block])
    for name in ("outputs", "keep"):
        _file(finished, name, block).write_bytes(data)
        _file(finished, name, block).with_name("0.0123abcd.partial").write_bytes(b"what zarr leaves of a killed write")

    CampaignStore.open(path).outputs[:]
    ablate.run(small_spec(), path, progress=False)

    assert files(path) == files(undisturbed)


@pytest.mark.parametrize("length", [0, 5, 31, 33])
def test_a_mark_that_cannot_be_read_is_named_and_repaired_as_advised(
    finished: CampaignStore, undisturbed: Path, small_spec: SmallSpec, files: Files, length: int
) -> None:
    path = _path(finished)
    mark = _file(finished, "ledger", FULL)
    mark.write_bytes((mark.read_bytes() * 2)[:length])

    with pytest.raises(
        DamagedBlockError, match=r"block 1 \(rows 7 to 13\).* its mark cannot be read \(ledger/c/1/0: "
    ) as raised:
        CampaignStore.open(path)
    assert f"`coar repair {path}` forgets it" in str(raised.value)

    assert stores.repair(path).forgotten == (FULL,)
    ablate.run(small_spec(), path, progress=False)
    assert files(path) == files(undisturbed)


def test_a_flipped_mark_is_noticed(finished: CampaignStore) -> None:
    mark = _file(finished, "ledger", FULL)
    data = bytearray(mark.read_bytes())
    data[20] ^= 1
    mark.write_bytes(data)

    with pytest.raises(DamagedBlockError, match=r"block 1 .* its sha256 is not the one in the ledger"):
        finished.read_block(FULL)


def test_a_block_is_on_the_disk_before_its_mark_is_written(
    finished: CampaignStore, monkeypatch: pytest.MonkeyPatch, unfinish: Unfinish
) -> None:
    path = _path(finished)
    keep, outputs = finished.read_block(FULL)
    unfinish(path, [FULL])
    for name in ("outputs", "keep"):
        _file(finished, name, FULL).unlink()
    flushed: list[str] = []

    def fsync(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").resolve().relative_to(path.resolve()))
        assert name.startswith("ledger") == _file(finished, "ledger", FULL).exists(), "the mark came before the data"
        flushed.append(name)

    monkeypatch.setattr("os.fsync", fsync)
    CampaignStore.open(path, mode="r+").write_block(FULL, keep, outputs)

    data = {f"{name}/c{tail}" for name in ("keep", "outputs") for tail in ("/1/0", "/1", "")}
    assert {name for name in flushed if not name.startswith("ledger")} == data, "files, and the folders that name them"
    assert [name for name in flushed if name.startswith("ledger")] == ["ledger/c/1/0", "ledger/c/1", "ledger/c"]
    assert _file(finished, "ledger", FULL).exists()


def test_a_disk_that_gives_back_other_bytes_gets_no_mark(
    finished: CampaignStore, monkeypatch: pytest.MonkeyPatch, unfinish: Unfinish
) -> None:
    keep, outputs = finished.read_block(FULL)
    unfinish(_path(finished), [FULL])
    store = CampaignStore.open(_path(finished), mode="r+")
    whole = store.blocks._stored_array

    def lying(name: str, block: int) -> Any:
        values = whole(name, block)
        return values + np.float32(1e-3) if name == "outputs" else values

    monkeypatch.setattr(store.blocks, "_stored_array", lying)
    with pytest.raises(StoreError, match=r"storage gave back other bytes than were written for block 1\."):
        store.write_block(FULL, keep, outputs)
    assert store.missing_blocks() == [FULL]


def test_data_that_equal_the_fill_value_are_stored_and_guarded(tmp_path: Path) -> None:
    columns = {"id": np.arange(10)}
    store = CampaignStore.create(tmp_path / "a", header={}, components=columns, examples=columns, rows=6, block_rows=4)
    for block in (0, 1):
        rows = store.span(block).stop - store.span(block).start
        store.write_block(block, np.zeros((rows, 10), dtype=bool), np.zeros((rows, 10), dtype=np.float32))

    store = CampaignStore.open(tmp_path / "a")
    np.testing.assert_array_equal(store.keep[:], np.zeros((6, 10), dtype=bool))
    np.testing.assert_array_equal(store.outputs[:], np.zeros((6, 10), dtype=np.float32))
    assert _file(store, "keep", 0).stat().st_size > 8  # 4 rows of 2 bytes, and checksums
    assert _file(store, "outputs", 1).stat().st_size > 160
    _file(store, "keep", 0).unlink()
    with pytest.raises(DamagedBlockError, match="the file of 'keep' is gone"):
        store.keep[0]
    with pytest.raises(DamagedBlockError, match="the file of 'keep' is gone"):
        CampaignStore.open(tmp_path / "a")


def _big_endian(node: dict[str, Any]) -> None:
    node["codecs"][0]["configuration"]["codecs"][0]["configuration"]["endian"] = "big"


def _integers(node: dict[str, Any]) -> None:
    node.update(data_type="int32", fill_value=0)


def _other_chunks(node: dict[str, Any]) -> None:
    node["codecs"][0]["configuration"]["chunk_shape"] = [1, 63]


@pytest.mark.parametrize("fast", ["0", "1"])
@pytest.mark.parametrize("change", [_big_endian, _integers, _other_chunks])
def test_damaged_metadata_of_an_array_change_no_number(
    finished: CampaignStore,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
    fast: str,
) -> None:
    monkeypatch.setenv("STORES_FAST_READ", fast)
    file = _path(finished) / "outputs" / "zarr.json"
    node = json.loads(file.read_text())
    change(node)
    file.write_text(json.dumps(node))

    found = CampaignStore.open(_path(finished))  # goes by the root, which is sealed
    np.testing.assert_array_equal(found.outputs[:], CampaignStore.open(undisturbed).outputs[:], strict=True)
    (damage,) = stores.verify(_path(finished)).damages
    assert (damage.what, damage.files) == ("metadata", (str(file),))
    assert stores.repair(_path(finished)).rewritten == (str(file),)
    assert stores.verify(_path(finished)).sound


@pytest.mark.parametrize("change", [_big_endian, _integers, _other_chunks])
def test_a_copy_with_damaged_metadata_is_not_read(
    finished: CampaignStore, undisturbed: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    make_copies(finished.location, ["column"])
    (file,) = _path(finished).glob("copies/column-*/outputs/zarr.json")
    node = json.loads(file.read_text())
    change(node)
    file.write_text(json.dumps(node))

    copies = Copies(CampaignStore.open(finished.location).blocks, ("outputs",))
    with pytest.warns(UserWarning, match="the copy .* is damaged .its metadata are not what was written"):
        assert copies.take("outputs", slice(0, 40), np.array([3])) is None
    assert stores.verify(finished.location).damages[0].files == (str(file),)
    assert stores.repair(finished.location).removed == (f"copies/{file.parents[1].name}",)
    np.testing.assert_array_equal(
        CampaignStore.open(finished.location).outputs[:, 3], CampaignStore.open(undisturbed).outputs[:, 3]
    )
