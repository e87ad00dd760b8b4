"""Other tools read both stores as they are: xarray by named dimensions, dask chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray

from stores import AttributionStore, CampaignStore

Arrays = dict[str, npt.NDArray[Any]]


def test_xarray_reads_a_campaign_by_name(campaign: CampaignStore, outputs: npt.NDArray[np.float32]) -> None:
    found = xarray.open_zarr(str(campaign.location))
    assert dict(found.sizes) == {"keep_rows": 10, "examples": 5, "keep_bytes": 2, "blocks": 3, "digest_bytes": 32}
    assert found["outputs"].dims == ("keep_rows", "examples")
    assert found["keep"].dims == ("keep_rows", "keep_bytes")
    np.testing.assert_array_equal(found["outputs"].isel(examples=[1, 3]).values, outputs[:, [1, 3]])
    np.testing.assert_allclose(found["outputs"].mean("keep_rows").values, outputs.mean(axis=0), rtol=1e-6)
    keep = np.unpackbits(found["keep"].values, axis=1, count=11, bitorder="little").astype(bool)
    np.testing.assert_array_equal(keep, campaign.keep[:])


def test_xarray_joins_weights_with_the_tables(attributions: AttributionStore, estimates: Arrays) -> None:
    place = str(attributions.location)
    tables = {name: xarray.open_zarr(place, group=name) for name in ("examples", "components", "quality")}
    names = {"examples": tables["examples"]["id"].values, "components": tables["components"]["name"].values}
    weights = xarray.open_zarr(place)["weights"].assign_coords(names)
    assert weights.dims == ("examples", "components")
    assert float(weights.sel(examples="ü4", components="conv2")) == estimates["weights"][4, 2]
    assert tables["examples"]["label"].dims == ("examples",)
    np.testing.assert_array_equal(tables["quality"]["r2"].values, estimates["quality/r2"])


def test_rows_that_are_not_finished_are_nan_for_xarray(
    tmp_path: Path, new_campaign: Callable[..., CampaignStore], keep: npt.NDArray[np.bool_], outputs: Any
) -> None:
    store = new_campaign(tmp_path / "a")
    store.write_block(1, keep[4:8], outputs[4:8])
    found = xarray.open_zarr(tmp_path / "a")["outputs"].values
    np.testing.assert_array_equal(found[4:8], outputs[4:8])
    assert np.isnan(np.delete(found, range(4, 8), axis=0)).all()


def test_book_keeping_in_a_store_does_not_disturb_xarray(
    tmp_path: Path, new_attributions: Callable[..., AttributionStore], fill: Callable[..., None], estimates: Arrays
) -> None:
    fill(new_attributions(tmp_path / "a"), estimates)
    (tmp_path / "a" / "work" / "leases").mkdir(parents=True)
    (tmp_path / "a" / "work" / "leases" / "0.json").write_text("{}")
    assert set(xarray.open_zarr(tmp_path / "a")) == {"weights", "stderr", "bias", "ledger"}


def test_dask_computes_on_both_stores(
    campaign: CampaignStore, attributions: AttributionStore, outputs: npt.NDArray[np.float32], estimates: Arrays
) -> None:
    pytest.importorskip("dask.array", reason="dask is not installed")
    lazy = xarray.open_zarr(str(campaign.location))["outputs"]
    assert lazy.chunks == ((4, 4, 2), (5,))  # a block of rows at a time
    np.testing.assert_allclose(lazy.mean("keep_rows").compute().values, outputs.mean(axis=0), rtol=1e-6)
    weights = xarray.open_zarr(str(attributions.location))["weights"]
    assert weights.chunks == ((3, 3, 1), (3,))
    np.testing.assert_array_equal(abs(weights).max("components").compute(), abs(estimates["weights"]).max(axis=1))


def test_dask_reads_the_arrays_without_xarray(attributions: AttributionStore, estimates: Arrays) -> None:
    dask_array = pytest.importorskip("dask.array", reason="dask is not installed")
    weights = dask_array.from_zarr(str(attributions.location), component="weights")
    np.testing.assert_array_equal(weights.max(axis=0).compute(), estimates["weights"].max(axis=0))
