"""CampaignStore: what is written comes back, what is not written is never read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from stores import CampaignStore, StoreExistsError, StoreNotFoundError, StoreUnreadableError, UnfinishedStoreError
from stores.work.worker import Worker

Keep = npt.NDArray[np.bool_]
Outputs = npt.NDArray[np.float32]
NewCampaign = Callable[..., CampaignStore]


def _write(store: CampaignStore, keep: Keep, outputs: Outputs, blocks: list[int]) -> None:
    for block in blocks:
        store.write_block(block, keep[store.span(block)], outputs[store.span(block)])


def test_blocks_come_back_as_written(campaign: CampaignStore, keep: Keep, outputs: Outputs) -> None:
    assert [campaign.span(block) for block in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    for block in range(3):
        found_keep, found_outputs = campaign.read_block(block)
        span = campaign.span(block)
        np.testing.assert_array_equal(found_keep, keep[span], strict=True)
        np.testing.assert_array_equal(found_outputs, outputs[span], strict=True)
        np.testing.assert_array_equal(campaign.read_keep(block), keep[span], strict=True)
        np.testing.assert_array_equal(campaign.read_outputs(block, slice(1, 4)), outputs[span, 1:4], strict=True)


def test_header_and_tables_come_back(campaign: CampaignStore) -> None:
    expected = {"note": "by hand", "format": "campaign", "format_version": 2, "component_count": 11}
    assert campaign.header == {**expected, "seal": campaign.header["seal"]}
    assert len(campaign.header["seal"]) == 64
    assert (campaign.rows, campaign.block_rows) == (10, 4)
    assert (campaign.component_count, campaign.example_count) == (11, 5)
    assert campaign.examples["id"].tolist() == ["ü0", "ü1", "ü2", "ü3", "ü4"]
    assert campaign.examples["label"].tolist() == [0, 1, 2, 0, 1]
    assert campaign.components["name"].tolist() == [f"conv{i}" for i in range(11)]


def test_the_format_is_not_the_callers_to_say(tmp_path: Path, new_campaign: NewCampaign) -> None:
    store = new_campaign(tmp_path / "a", header={"format": "other", "format_version": 7, "component_count": 3})

    expected = {"format": "campaign", "format_version": 2, "component_count": 11}
    assert store.header == {**expected, "seal": store.header["seal"]}


def test_an_unfinished_campaign_shows_finished_rows_only(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    store = new_campaign(tmp_path / "a")
    assert (store.outputs[:].shape, store.keep[:].shape) == ((0, 5), (0, 11))
    assert store.finished_rows.tolist() == []

    _write(store, keep, outputs, [2, 0])  # in any order

    rows = [0, 1, 2, 3, 8, 9]
    assert store.finished_rows.tolist() == rows
    assert (store.finished_blocks(), store.missing_blocks()) == ([0, 2], [1])
    assert (store.progress.finished_blocks, store.progress.blocks) == (2, 3)
    assert (store.progress.finished_rows, store.progress.rows, store.progress.complete) == (6, 10, False)
    np.testing.assert_array_equal(store.outputs[:], outputs[rows])
    np.testing.assert_array_equal(store.outputs[-2], outputs[8])
    np.testing.assert_array_equal(store.keep[:], keep[rows])
    np.testing.assert_array_equal(store.keep[[5, 0], 3:], keep[[9, 0], 3:])
    with pytest.raises(IndexError, match="index 6 is out of bounds"):
        store.outputs[6]


def test_a_reader_sees_what_was_finished_when_it_opened(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    writer = new_campaign(tmp_path / "a")
    _write(writer, keep, outputs, [1])
    reader = CampaignStore.open(tmp_path / "a")
    fingerprint, view = reader.fingerprint, writer.outputs

    _write(writer, keep, outputs, [0])

    assert (reader.finished_blocks(), reader.missing_blocks(), reader.fingerprint) == ([1], [0, 2], fingerprint)
    assert (len(reader.keep), reader.finished_rows.tolist()) == (4, [4, 5, 6, 7])
    np.testing.assert_array_equal(reader.outputs[:], outputs[4:8])
    np.testing.assert_array_equal(CampaignStore.open(tmp_path / "a").outputs[:], outputs[:8])
    assert writer.finished_blocks() == [0, 1]  # a writer sees what is finished now
    np.testing.assert_array_equal(writer.outputs[:], outputs[:8])
    np.testing.assert_array_equal(view[:], outputs[4:8])  # but a view stays what it was


def test_an_unfinished_block_is_never_read(tmp_path: Path, new_campaign: NewCampaign) -> None:
    store = new_campaign(tmp_path / "a")
    text = f"{tmp_path / 'a'}: block 1 is not finished. Run the same command again."

    reads: list[Callable[[], Any]] = [
        lambda: store.read_block(1),
        lambda: store.read_keep(1),
        lambda: store.read_outputs(1, slice(0, 5)),
    ]
    for read in reads:
        with pytest.raises(UnfinishedStoreError) as raised:
            read()
        assert str(raised.value) == text


def test_a_finished_block_is_never_rewritten(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    store = new_campaign(tmp_path / "a")
    _write(store, keep, outputs, [1])

    assert store.write_block(1, ~keep[4:8], -outputs[4:8]) is False

    np.testing.assert_array_equal(store.read_block(1)[0], keep[4:8])
    np.testing.assert_array_equal(store.read_block(1)[1], outputs[4:8])


@pytest.mark.parametrize(
    ("block", "keep_shape", "outputs_shape", "message"),
    [
        (0, (3, 11), (4, 5), "keep of block 0 is bool of shape (3, 11), expected bool of shape (4, 11)."),
        (
            0,
            (4, 10),
            (4, 5),
            "keep of block 0 is bool of shape (4, 10), expected bool of shape (4, 11).",
        ),  # also 2 bytes
        (0, (4, 16), (4, 5), "keep of block 0 is bool of shape (4, 16), expected bool of shape (4, 11)."),
        (0, (11,), (4, 5), "keep of block 0 is bool of shape (11,), expected bool of shape (4, 11)."),
        (0, (4, 11), (4, 6), "block 0 of 'outputs' has shape (4, 6), expected (4, 5)."),
        (0, (4, 11), (20,), "block 0 of 'outputs' has shape (20,), expected (4, 5)."),
        (2, (4, 11), (4, 5), "keep of block 2 is bool of shape (4, 11), expected bool of shape (2, 11)."),
        (2, (2, 11), (4, 5), "block 2 of 'outputs' has shape (4, 5), expected (2, 5)."),
    ],
)
def test_wrong_shapes_are_refused(
    tmp_path: Path,
    new_campaign: NewCampaign,
    block: int,
    keep_shape: tuple[int, ...],
    outputs_shape: tuple[int, ...],
    message: str,
) -> None:
    store = new_campaign(tmp_path / "a")

    with pytest.raises(ValueError, match="shape") as raised:
        store.write_block(block, np.ones(keep_shape, dtype=bool), np.ones(outputs_shape, dtype=np.float32))

    assert str(raised.value) == f"{tmp_path / 'a'}: {message}"
    assert store.finished_blocks() == []


def test_keep_is_bool_or_refused(tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs) -> None:
    store = new_campaign(tmp_path / "a")
    wrong: Any = keep[:4].astype(np.uint8)

    with pytest.raises(ValueError, match=r"keep of block 0 is uint8 of shape \(4, 11\), expected bool of shape"):
        store.write_block(0, wrong, outputs[:4])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_are_finite_or_refused(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs, value: float
) -> None:
    store = new_campaign(tmp_path / "a")
    wrong = outputs[4:8].copy()
    wrong[2, 3] = value

    with pytest.raises(ValueError, match="finite") as raised:
        store.write_block(1, keep[4:8], wrong)

    assert str(raised.value) == (
        f"{tmp_path / 'a'}: block 1 of 'outputs' is {value} in row 6, column 3, expected a finite number. "
        "Nothing was stored."
    )
    assert not list((tmp_path / "a").glob("*/c/1/0"))


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_does_not_exist_is_named(campaign: CampaignStore, block: int) -> None:
    with pytest.raises(IndexError, match=rf"block {block} does not exist; blocks are 0 to 2\."):
        campaign.read_block(block)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=15)
def test_any_size_comes_back(
    new_campaign: NewCampaign, rows: int, block_rows: int, components: int, examples: int
) -> None:
    store = new_campaign(MemoryStore(), rows, block_rows, components=components, examples=examples)
    keep = np.random.default_rng(rows).random((rows, components)) < 0.5
    outputs = np.random.default_rng(rows).standard_normal((rows, examples)).astype(np.float32)
    _write(store, keep, outputs, store.missing_blocks())

    assert store.progress.complete
    assert store.progress.blocks == -(-rows // min(block_rows, rows))
    np.testing.assert_array_equal(store.keep[:], keep, strict=True)
    np.testing.assert_array_equal(store.outputs[:], outputs, strict=True)


def test_more_examples_than_one_inner_chunk_holds(tmp_path: Path, new_campaign: NewCampaign) -> None:
    store = new_campaign(tmp_path / "a", 5, 3, components=2, examples=5000)  # 3 inner chunks, the last one not full
    keep = np.ones((5, 2), dtype=bool)
    outputs = np.random.default_rng(0).standard_normal((5, 5000)).astype(np.float32)
    _write(store, keep, outputs, [0, 1])

    np.testing.assert_array_equal(CampaignStore.open(tmp_path / "a").outputs[:], outputs)
    np.testing.assert_array_equal(store.outputs[::2, 2040:4100:7], outputs[::2, 2040:4100:7])
    np.testing.assert_array_equal(store.read_outputs(1, slice(4000, 5000)), outputs[3:, 4000:])


def test_require_complete_says_what_is_missing(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    store = new_campaign(tmp_path / "a", block_rows=1)
    _write(store, keep, outputs, [4])

    with pytest.raises(UnfinishedStoreError) as raised:
        store.require_complete()
    assert str(raised.value) == (
        f"{tmp_path / 'a'}: 9 of 10 blocks are not finished (0, 1, 2, 3, 5, 6, 7, 8, ...). "
        "Run the same `coar ablate` command again to finish it."
    )

    _write(store, keep, outputs, [0, 1, 2, 3, 5, 6, 8])
    with pytest.raises(UnfinishedStoreError) as raised:
        store.require_complete()
    assert str(raised.value) == (
        f"{tmp_path / 'a'}: 2 of 10 blocks are not finished (7, 9). "
        "Run the same `coar ablate` command again to finish it."
    )

    _write(store, keep, outputs, [7, 9])
    store.require_complete()


def test_fingerprints_are_equal_where_data_are(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    first, same, other = (new_campaign(tmp_path / name) for name in ("first", "same", "other"))
    assert first.fingerprint == same.fingerprint
    _write(first, keep, outputs, [0, 1, 2])
    _write(same, keep, outputs, [2, 0])
    assert first.fingerprint != same.fingerprint
    _write(same, keep, outputs, [1])
    changed = keep.copy()
    changed[9, 10] ^= True
    _write(other, changed, outputs, [0, 1, 2])

    assert first.fingerprint == same.fingerprint == CampaignStore.open(tmp_path / "same").fingerprint
    assert first.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_a_mark_is_the_sha256_of_names_shapes_and_bytes(campaign: CampaignStore, keep: Keep, outputs: Outputs) -> None:
    packed = np.packbits(keep[8:], axis=1, bitorder="little")
    text = b"keep:|u1:(2, 2);" + packed.tobytes() + b"outputs:<f4:(2, 5);" + outputs[8:].tobytes()

    assert Path(str(campaign.location), "ledger/c/2/0").read_bytes() == hashlib.sha256(text).digest()


def test_xarray_reads_it_as_it_is(campaign: CampaignStore, outputs: Outputs) -> None:
    dataset = xarray.open_zarr(str(campaign.location))  # a warning would be an error here
    examples = xarray.open_zarr(str(campaign.location), group="examples")

    assert dataset["outputs"].dims == ("keep_rows", "examples")
    assert dataset["keep"].dims == ("keep_rows", "keep_bytes")
    assert dataset["ledger"].dims == ("blocks", "digest_bytes")
    assert examples["id"].dims == ("examples",)
    assert examples["label"].dims == ("examples",)
    assert xarray.open_zarr(str(campaign.location), group="components")["name"].dims == ("components",)
    np.testing.assert_array_equal(dataset["outputs"].to_numpy(), outputs)
    assert examples["id"].to_numpy().tolist() == campaign.examples["id"].tolist()


def test_a_memory_store_works_too(new_campaign: NewCampaign, keep: Keep, outputs: Outputs) -> None:
    memory = MemoryStore()
    with pytest.raises(StoreNotFoundError, match=r"No campaign store at memory://\d+: nothing is there"):
        CampaignStore.open(memory)
    _write(new_campaign(memory), keep, outputs, [0, 1, 2])

    store = CampaignStore.open(memory)

    store.require_complete()
    np.testing.assert_array_equal(store.outputs[:], outputs)
    np.testing.assert_array_equal(store.keep[:], keep)
    with pytest.raises(StoreExistsError, match=r"There is something at memory://\d+ already"):
        new_campaign(memory)


def test_opening_and_reading_changes_no_file(campaign: CampaignStore) -> None:
    path = Path(str(campaign.location))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}

    store = CampaignStore.open(path, mode="r+")
    _ = store.outputs[:], store.keep[:], store.examples, store.components, store.fingerprint, store.read_block(2)

    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def test_a_store_open_for_reading_is_not_written_to(
    tmp_path: Path, new_campaign: NewCampaign, keep: Keep, outputs: Outputs
) -> None:
    new_campaign(tmp_path / "a")
    store = CampaignStore.open(tmp_path / "a")

    with pytest.raises(ValueError, match="read-only"):
        _write(store, keep, outputs, [0])
    assert store.finished_blocks() == []


@pytest.mark.parametrize("mode", ["w", "a", "w-", "x"])
def test_no_mode_of_opening_destroys(campaign: CampaignStore, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"mode is '{mode}', expected 'r' \(read\) or 'r\+' \(read and write\)\."):
        CampaignStore.open(campaign.location, mode=mode)
    CampaignStore.open(campaign.location).require_complete()


def test_environments_are_those_of_the_workers_and_of_an_old_header(tmp_path: Path, new_campaign: NewCampaign) -> None:
    store = new_campaign(tmp_path / "a", header={"environments": [{"threads": 1}]})
    root = (tmp_path / "a" / "zarr.json").read_bytes()
    for threads in (2, 1, 2):
        with Worker(store.blocks.store, {"threads": threads}):
            pass

    assert CampaignStore.open(tmp_path / "a").environments == [{"threads": 1}, {"threads": 2}]
    assert (tmp_path / "a" / "zarr.json").read_bytes() == root, "the header is written once"
    assert set(xarray.open_zarr(tmp_path / "a")) == {"outputs", "keep", "ledger"}


def test_a_header_is_sealed(tmp_path: Path, new_campaign: NewCampaign) -> None:
    new_campaign(tmp_path / "a")
    file = tmp_path / "a" / "zarr.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document))  # laid out otherwise, but the same
    CampaignStore.open(tmp_path / "a")

    for change in ({"note": "by hands"}, {"seal": "0" * 64}, {"more": None}):
        file.write_text(json.dumps({**document, "attributes": {**document["attributes"], **change}}))
        with pytest.raises(StoreUnreadableError) as raised:
            CampaignStore.open(tmp_path / "a")
        assert str(raised.value) == (
            f"{file} was changed after it was written: its seal, the sha256 of its content, does not fit. Its metadata "
            "is damaged or it was not written by this toolkit; restore it from a copy, or delete it and run again."
        )
