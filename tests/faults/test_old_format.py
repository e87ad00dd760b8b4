"""A campaign that format 1 began is gone on with after `coar migrate`, and nothing finished is computed again."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ablate
import coar
import stores
from stores import AttributionStore, CampaignStore, OldFormatError

pytestmark = pytest.mark.faults

FIXTURE = Path(__file__).parents[1] / "stores" / "fixtures" / "v1.tar.gz"


def test_an_old_campaign_is_finished_after_migrating(
    tmp_path: Path, small_spec: Callable[..., ablate.CampaignSpec]
) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "v1" / "unfinished.zarr"
    with np.load(tmp_path / "v1" / "expected.npz") as arrays:
        outputs, keep = arrays["outputs"], arrays["keep"]
    before = CampaignStore.open(path)
    marks = before.blocks.digests()

    with pytest.raises(OldFormatError, match=f"run `coar migrate {path}` once"):
        ablate.run(small_spec(), path, progress=False, accept_versions=True)
    stores.migrate(path)
    done = ablate.run(small_spec(), path, progress=False, accept_versions=True)  # other versions may be installed here

    assert done.progress.complete
    np.testing.assert_array_equal(done.keep[:], keep)
    np.testing.assert_allclose(done.outputs[:], outputs, rtol=1e-5, atol=1e-6)
    finished = marks.any(axis=1)
    np.testing.assert_array_equal(done.blocks.digests()[finished], marks[finished])
    worker = stores.WorkLog(done.blocks.store).workers()[-1]
    assert worker.blocks == 2
    assert len(done.environments) == 2 or done.environments[0] == worker.facts


def test_an_old_campaign_is_fitted_as_it_is(tmp_path: Path) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    before = {p: p.read_bytes() for p in (tmp_path / "v1").rglob("*") if p.is_file()}

    fitted = coar.fit(tmp_path / "v1" / "unfinished.zarr", held_out=False)
    whole = coar.fit(tmp_path / "v1" / "finished.zarr", held_out=False)

    assert (fitted.header["identity"]["rows"], whole.header["identity"]["rows"]) == (28, 40)
    assert fitted.weights[:].shape == (9, 10)
    assert coar.open_attributions(tmp_path / "v1" / "attributions.zarr").top(0, k=3)["weight"].notna().all()
    assert {p: p.read_bytes() for p in (tmp_path / "v1").rglob("*") if p.is_file()} == before


def test_an_old_estimate_is_refused_or_replaced(tmp_path: Path, small_spec: Callable[..., ablate.CampaignSpec]) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "v1" / "attributions.zarr"

    def estimate(**options: Any) -> AttributionStore:
        spec = small_spec(ablate_fraction=0.2)
        return coar.estimate(spec, passes=6, quality_rows=10, block_examples=4, store=path, **options).store

    with pytest.raises(OldFormatError, match="run `coar migrate"):
        estimate()
    assert estimate(overwrite=True).header["format_version"] == 2
    assert stores.verify(path).sound
