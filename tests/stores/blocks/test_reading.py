"""Reading by tensorstore gives what zarr gives: numbers, and errors where a file is not what it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from stores import AttributionStore, CampaignStore, DamagedBlockError, StoreError
from stores.blocks.reading import SWITCH, ArrayReader, fast_reading

Arrays = dict[str, npt.NDArray[Any]]

WAYS = ["0", "1"]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads by tensorstore; skips where it is not installed."""
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    monkeypatch.setenv(SWITCH, "1")


def _no_zarr(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> NoReturn:
        raise AssertionError("zarr was asked for the data")

    monkeypatch.setattr(zarr.Array, "oindex", property(fail))


def _selection(length: int) -> st.SearchStrategy[Any]:
    bound = st.integers(0, length)
    run = st.tuples(bound, bound).map(lambda ends: slice(min(ends), max(ends)))
    return st.one_of(run, st.just(slice(None)), st.lists(st.integers(0, length - 1), max_size=5).map(_positions))


def _positions(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


@given(rows=_selection(10), columns=_selection(5))
def test_both_read_what_numpy_does(
    campaign: CampaignStore, outputs: npt.NDArray[np.float32], rows: Any, columns: Any
) -> None:
    expected = outputs[rows][:, columns]
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, way)
            found = ArrayReader(campaign.blocks.arrays["outputs"]).take(rows, columns)
        np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.usefixtures("fast")
def test_tensorstore_reads_every_array_itself(
    attributions: AttributionStore,
    campaign: CampaignStore,
    estimates: Arrays,
    outputs: npt.NDArray[np.float32],
    keep: npt.NDArray[np.bool_],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _no_zarr(monkeypatch)

    np.testing.assert_array_equal(CampaignStore.open(campaign.location).outputs[:], outputs, strict=True)
    np.testing.assert_array_equal(CampaignStore.open(campaign.location).keep[2:], keep[2:], strict=True)
    store = AttributionStore.open(attributions.location)
    np.testing.assert_array_equal(store.weights[[5, 0], 1], estimates["weights"][[5, 0], 1], strict=True)
    np.testing.assert_array_equal(store.bias[:], estimates["bias"], strict=True)
    np.testing.assert_array_equal(store.quality["correlation"], estimates["quality/correlation"], strict=True)


def test_it_can_be_switched_off(
    campaign: CampaignStore, outputs: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert not fast_reading()
    _no_zarr(monkeypatch)

    with pytest.raises(AssertionError, match="zarr was asked"):
        CampaignStore.open(campaign.location).outputs[:]


def test_a_wrong_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "yes")

    with pytest.raises(StoreError) as raised:
        fast_reading()

    assert str(raised.value) == (
        "STORES_FAST_READ is 'yes', expected 1 (read by tensorstore if it is installed) or 0 (by zarr)."
    )


@pytest.mark.usefixtures("fast")
def test_other_places_than_local_ones_are_read_by_zarr(
    new_campaign: Callable[..., CampaignStore], keep: npt.NDArray[np.bool_], outputs: npt.NDArray[np.float32]
) -> None:
    memory = MemoryStore()
    store = new_campaign(memory)
    for block in range(3):
        store.write_block(block, keep[store.span(block)], outputs[store.span(block)])

    np.testing.assert_array_equal(CampaignStore.open(memory).outputs[:, 3], outputs[:, 3])


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["lost", "emptied", "cut", "flipped"])
@pytest.mark.parametrize("name", ["weights", "bias"])
def test_damage_is_told_alike(
    tmp_path: Path, attributions: AttributionStore, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(str(attributions.location), tmp_path / "a")
    store = AttributionStore.open(tmp_path / "a")
    path = tmp_path / "a" / ("weights/c/1/0" if name == "weights" else "bias/c/1")
    if damage == "lost":
        path.unlink()
    else:
        bad = bytearray(path.read_bytes())
        bad[2] ^= 8
        path.write_bytes({"emptied": b"", "cut": path.read_bytes()[:-3], "flipped": bytes(bad)}[damage])

    texts = []
    for way in WAYS:
        monkeypatch.setenv(SWITCH, way)
        with pytest.raises(DamagedBlockError, match=rf"block 1 \(rows 3 to 5\) is damaged: .*{name}") as raised:
            getattr(store, name)[:]
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


FORK = """
import os, sys
import numpy as np
from stores import CampaignStore
store = CampaignStore.open(sys.argv[1])
before = store.outputs[:]
child = os.fork()
if not child:
    same = np.array_equal(store.outputs[:], before)
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("fast")
def test_a_forked_process_reads_without_the_threads_of_its_parent(campaign: CampaignStore) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(campaign.location)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "0", done.stderr
