"""Planned bytes against finished stores, counted file by file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ablate
import coar
from ablate import CampaignSpec, Examples
from coar.planning.disk import attribution_bytes, campaign_bytes
from stores import AttributionStore
from stores.maintenance.compact import make_copies

CLOSE = 0.05  # of a fit, whose header is longer, and of copies, which come with small files


def on_disk(store: Path) -> int:
    """Returns the bytes of a store without what workers write about themselves."""
    own = (file for file in store.rglob("*") if file.is_file() and "work" not in file.relative_to(store).parts)
    return sum(file.stat().st_size for file in own)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 37), nn.ReLU(), nn.Linear(37, 2)).eval()


def _spec(net: nn.Module, examples: int, rows: int, block_rows: int) -> CampaignSpec:
    inputs = torch.randn(examples, 3, generator=torch.Generator().manual_seed(0))
    data = Examples(inputs, [0] * examples, [f"name-{i}" for i in range(examples)])
    return CampaignSpec(model=net, data=data, rows=rows, ablate_fraction=0.1, block_rows=block_rows)


SIZES = (
    pytest.param(5, 30, 10, id="small"),
    pytest.param(5, 31, 10, id="a short last block"),
    pytest.param(3000, 200, 64, id="more examples than an inner chunk"),
)


@pytest.mark.parametrize(("examples", "rows", "block_rows"), SIZES)
def test_bytes_of_a_campaign_are_exact(
    net: nn.Module, tmp_path: Path, examples: int, rows: int, block_rows: int
) -> None:
    spec = _spec(net, examples, rows, block_rows)
    store = ablate.run(spec, tmp_path / "c.zarr", progress=False)
    model, data = spec.load()
    planned = campaign_bytes(spec, spec.make_index(model), data, store.header["identity"], rows)
    assert planned == on_disk(tmp_path / "c.zarr")


def test_bytes_of_the_copy_that_compact_adds(net: nn.Module, tmp_path: Path) -> None:
    plain = _spec(net, 1000, 200, 50)
    spec = CampaignSpec(model=net, data=plain.load()[1], rows=200, ablate_fraction=0.1, block_rows=50, compact=True)
    store = ablate.run(plain, tmp_path / "c.zarr", progress=False)
    make_copies(tmp_path / "c.zarr")
    model, data = spec.load()
    planned = campaign_bytes(spec, spec.make_index(model), data, store.header["identity"], 200)
    assert planned == pytest.approx(on_disk(tmp_path / "c.zarr"), rel=CLOSE)


@pytest.mark.parametrize("examples", [5, 300])
def test_bytes_of_attributions(net: nn.Module, tmp_path: Path, examples: int) -> None:
    spec = _spec(net, examples, 60, 20)
    model, data = spec.load()
    index = spec.make_index(model)
    coar.estimate(spec, store=tmp_path / "e.zarr", passes=2, quality_rows=10)
    block = AttributionStore.open(tmp_path / "e.zarr").block_examples
    header = AttributionStore.open(tmp_path / "e.zarr").header
    planned = attribution_bytes(spec, index, data, header["identity"], block, "gradient")
    assert planned == on_disk(tmp_path / "e.zarr")
    campaign = ablate.run(spec, tmp_path / "c.zarr", progress=False)
    coar.fit(campaign, tmp_path / "f.zarr")
    block = AttributionStore.open(tmp_path / "f.zarr").block_examples
    planned = attribution_bytes(spec, index, data, header["identity"], block, "regression")
    assert planned == pytest.approx(on_disk(tmp_path / "f.zarr"), rel=CLOSE)
