"""AttributionStore: whole or not at all, and only quality may be undefined."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray
from zarr.storage import MemoryStore

from stores import AttributionStore, DamagedBlockError, StoreNotFoundError, UnfinishedStoreError

Arrays = dict[str, npt.NDArray[np.float32]]
NewAttributions = Callable[..., AttributionStore]
Fill = Callable[..., None]


def test_everything_comes_back_as_written(attributions: AttributionStore, estimates: Arrays) -> None:
    np.testing.assert_array_equal(attributions.weights[:], estimates["weights"], strict=True)
    np.testing.assert_array_equal(attributions.stderr[:], estimates["stderr"], strict=True)
    np.testing.assert_array_equal(attributions.bias[:], estimates["bias"], strict=True)
    assert sorted(attributions.quality) == ["correlation", "r2", "residual_sd", "ridge"]
    for name, values in attributions.quality.items():
        np.testing.assert_array_equal(values, estimates[f"quality/{name}"], strict=True)
    assert np.isnan(attributions.quality["correlation"]).tolist() == [False] * 5 + [True, False]
    assert (attributions.example_count, attributions.component_count, attributions.block_examples) == (7, 3, 3)
    columns = ["correlation", "r2", "ridge", "residual_sd"]
    seal = attributions.header["seal"]
    expected = {"note": "by hand", "quality": columns, "format": "attributions", "format_version": 2, "seal": seal}
    assert attributions.header == expected
    assert attributions.examples["id"].tolist() == [f"ü{i}" for i in range(7)]
    assert attributions.components["name"].tolist() == ["conv0", "conv1", "conv2"]
    attributions.verify()


def test_blocks_of_a_slab(attributions: AttributionStore) -> None:
    assert [attributions.span(block) for block in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert attributions.blocks_of(slice(0, 7)) == [0, 1, 2]
    assert attributions.blocks_of(slice(3, 6)) == [1]


def test_an_unfinished_one_does_not_open(
    tmp_path: Path, new_attributions: NewAttributions, fill: Fill, estimates: Arrays
) -> None:
    store = new_attributions(tmp_path / "a")
    fill(store, estimates, [2, 0])
    assert store.missing_blocks() == [1]

    with pytest.raises(UnfinishedStoreError) as raised:
        AttributionStore.open(tmp_path / "a")
    assert str(raised.value) == (
        f"{tmp_path / 'a'}: only 2 of 3 blocks of examples are estimated. Run the same again to finish it."
    )

    going_on = AttributionStore.open(tmp_path / "a", finish=True)
    assert going_on.missing_blocks() == [1]
    np.testing.assert_array_equal(going_on.weights[:], estimates["weights"][[0, 1, 2, 6]])
    with pytest.raises(UnfinishedStoreError, match="block 1 is not finished"):
        going_on.verify()
    fill(going_on, estimates, [1])
    np.testing.assert_array_equal(AttributionStore.open(tmp_path / "a").weights[:], estimates["weights"])


def test_quality_of_an_unfinished_store_is_not_made_up(
    tmp_path: Path, new_attributions: NewAttributions, fill: Fill, estimates: Arrays
) -> None:
    store = new_attributions(tmp_path / "a")
    fill(store, estimates, [0, 2])

    assert store.quality["ridge"].tolist() == estimates["quality/ridge"][[0, 1, 2, 6]].tolist()


@pytest.mark.parametrize("name", ["weights", "stderr", "bias"])
def test_only_quality_may_be_undefined(
    tmp_path: Path, new_attributions: NewAttributions, estimates: Arrays, name: str
) -> None:
    store = new_attributions(tmp_path / "a")
    values = {key: value[3:6].copy() for key, value in estimates.items()}
    values[name].flat[-1] = np.nan
    place = "row 5" if name == "bias" else "row 5, column 2"

    with pytest.raises(ValueError, match="finite") as raised:
        store.write_block(1, values)

    assert str(raised.value) == (
        f"{tmp_path / 'a'}: block 1 of '{name}' is nan in {place}, expected a finite number. Nothing was stored."
    )
    assert store.missing_blocks() == [0, 1, 2]


def test_arrays_are_given_all_and_no_others(
    tmp_path: Path, new_attributions: NewAttributions, estimates: Arrays
) -> None:
    store = new_attributions(tmp_path / "a")
    values = {key: value[:3] for key, value in estimates.items()}
    expected = "expected bias, quality/correlation, quality/r2, quality/residual_sd, quality/ridge, stderr, weights"

    with pytest.raises(ValueError, match=rf"block 0 came with weights, {expected}\. "):
        store.write_block(0, {"weights": values["weights"]})
    with pytest.raises(ValueError, match="came with bias, hunch, quality/correlation"):
        store.write_block(0, {**values, "hunch": values["bias"]})
    with pytest.raises(ValueError, match=r"block 0 of 'stderr' has shape \(3, 2\), expected \(3, 3\)\."):
        store.write_block(0, {**values, "stderr": values["stderr"][:, :2]})
    assert store.missing_blocks() == [0, 1, 2]


def test_a_finished_block_is_never_rewritten(
    tmp_path: Path, new_attributions: NewAttributions, fill: Fill, estimates: Arrays
) -> None:
    store = new_attributions(tmp_path / "a")
    fill(store, estimates, [2])

    other = {name: value[store.span(2)] + 1 for name, value in estimates.items()}
    assert store.write_block(2, other) is False

    np.testing.assert_array_equal(
        AttributionStore.open(tmp_path / "a", finish=True).weights[:], estimates["weights"][6:]
    )


def test_xarray_reads_it_as_it_is(attributions: AttributionStore) -> None:
    dataset = xarray.open_zarr(str(attributions.location))
    quality = xarray.open_zarr(str(attributions.location), group="quality")

    assert dataset["weights"].dims == ("examples", "components")
    assert dataset["stderr"].dims == ("examples", "components")
    assert dataset["bias"].dims == ("examples",)
    assert {quality[name].dims for name in quality} == {("examples",)}


def test_a_memory_store_works_too(new_attributions: NewAttributions, fill: Fill, estimates: Arrays) -> None:
    memory = MemoryStore()
    with pytest.raises(StoreNotFoundError, match="No attributions store at memory://"):
        AttributionStore.open(memory)
    fill(new_attributions(memory), estimates)

    np.testing.assert_array_equal(AttributionStore.open(memory).weights[:], estimates["weights"])


FILES = [
    *("weights/c/1/0", "stderr/c/1/0", "bias/c/1"),
    *(f"quality/{name}/c/1" for name in ("correlation", "r2", "ridge", "residual_sd")),
]


@pytest.mark.faults
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["lost", "emptied", "cut", "flipped", "swapped"])
def test_damage_is_never_read_as_data(tmp_path: Path, attributions: AttributionStore, file: str, damage: str) -> None:
    shutil.copytree(str(attributions.location), tmp_path / "a")
    store = AttributionStore.open(tmp_path / "a")
    path = tmp_path / "a" / file
    good = path.read_bytes()
    name = file.split("/c/")[0]

    def read() -> Any:
        return store.quality if name.startswith("quality") else getattr(store, name)[:]

    if damage == "swapped":  # a whole and healthy file, of another block: only the sha256 knows
        path.write_bytes((tmp_path / "a" / file.replace("/c/1", "/c/0")).read_bytes())
    elif damage == "lost":
        path.unlink()
    else:
        bad = bytearray(good)
        bad[2] ^= 8
        path.write_bytes({"emptied": b"", "cut": good[:-3], "flipped": bytes(bad)}[damage])

    with pytest.raises(DamagedBlockError, match=r"block 1 \(rows 3 to 5\) is damaged"):
        store.verify()
    if damage != "swapped":
        with pytest.raises(DamagedBlockError, match=rf"block 1 \(rows 3 to 5\) is damaged: .*{name}"):
            read()
    if damage in ("lost", "emptied"):
        reason = {"lost": "gone", "emptied": "empty"}[damage]
        with pytest.raises(DamagedBlockError, match=f"the file of '{name}' is {reason}"):
            AttributionStore.open(tmp_path / "a")
    path.write_bytes(good)
    store.verify()
