"""Law 2: the stored numbers depend on the campaign, not on how it was cut into blocks or carried out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ablate
from stores import CampaignStore

SmallSpec = Callable[..., ablate.CampaignSpec]
Files = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize("block_rows", [1, 7, 64, 40])
def test_block_size_changes_no_bit(tmp_path: Path, small_spec: SmallSpec, undisturbed: Path, block_rows: int) -> None:
    store = ablate.run(small_spec(block_rows=block_rows), tmp_path / "a", progress=False)
    other = CampaignStore.open(undisturbed)

    assert store.progress.blocks == -(-40 // block_rows)
    assert store.outputs[:].tobytes() == other.outputs[:].tobytes()
    assert store.keep[:].tobytes() == other.keep[:].tobytes()


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_batch_size_changes_rounding_only(
    tmp_path: Path, small_spec: SmallSpec, undisturbed: Path, batch_size: int
) -> None:
    store = ablate.run(small_spec(batch_size=batch_size), tmp_path / "a", progress=False)
    other = CampaignStore.open(undisturbed)

    scale = np.abs(other.outputs[:]).max()
    assert np.abs(store.outputs[:] - other.outputs[:]).max() <= 1e-5 * scale
    assert store.keep[:].tobytes() == other.keep[:].tobytes()


def test_the_same_campaign_is_the_same_store(
    tmp_path: Path, small_spec: SmallSpec, undisturbed: Path, files: Files
) -> None:
    store = ablate.run(small_spec(), tmp_path / "elsewhere" / "a", progress=False)

    assert files(tmp_path / "elsewhere" / "a") == files(undisturbed)
    assert store.fingerprint == CampaignStore.open(undisturbed).fingerprint


def test_a_longer_campaign_begins_with_the_shorter_one(
    tmp_path: Path, small_spec: SmallSpec, undisturbed: Path
) -> None:
    store = ablate.run(small_spec(rows=45), tmp_path / "a", progress=False)
    shorter = CampaignStore.open(undisturbed)

    np.testing.assert_array_equal(store.keep[:40], shorter.keep[:])
    np.testing.assert_array_equal(store.outputs[:40], shorter.outputs[:])


def test_a_store_holds_what_the_plan_and_the_engine_say(small_spec: SmallSpec, undisturbed: Path) -> None:
    model, examples = small_spec().load()
    store = CampaignStore.open(undisturbed)
    index = ablate.ComponentIndex.from_json(store.header["index"])
    keep = ablate.KeepPlan(10, 40, 0.3, 5).take(0, 40)

    np.testing.assert_array_equal(store.keep[:], keep)
    expected = ablate.reference_outputs(model, index, keep, examples.inputs(), examples.targets)
    np.testing.assert_allclose(store.outputs[:], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert store.examples["id"].tolist() == list(examples.ids)
    assert store.components["name"].tolist() == index.table()["name"].tolist()
