"""Law 6: a fit stays inside its memory budget, however large the campaign is."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import coar
from stores import CampaignStore

pytestmark = pytest.mark.slow

ROWS, EXAMPLES, COMPONENTS, BLOCK = 10_000, 2400, 24, 250
MIB = 2**20


@pytest.fixture(scope="module")
def large_campaign(
    tmp_path_factory: pytest.TempPathFactory,
    write_campaign: Callable[..., CampaignStore],
    draw_keep: Callable[..., npt.NDArray[np.bool_]],
) -> CampaignStore:
    """96 MB of outputs on disk, made from a few examples that repeat."""
    keep = draw_keep(ROWS, COMPONENTS)
    generator = np.random.default_rng(1)
    few = keep @ generator.normal(size=(COMPONENTS, 50)) + generator.normal(size=(ROWS, 50))
    store = write_campaign(
        keep,
        np.broadcast_to(np.zeros(EXAMPLES, dtype=np.float32), (ROWS, EXAMPLES)),
        tmp_path_factory.mktemp("large") / "campaign.zarr",
        block_rows=BLOCK,
        blocks=[],
    )
    for block in store.missing_blocks():
        span = store.span(block)
        store.write_block(block, keep[span], np.tile(few[span].astype(np.float32), EXAMPLES // 50))
    return store


def _peak(work: Callable[[], object]) -> int:
    """Returns the most bytes that were in use at a time during `work`, beyond those before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _least(refused: pytest.ExceptionInfo[coar.FitError]) -> int:
    found = re.search(r"at least ([\d,]+) are needed", str(refused.value))
    assert found is not None
    return int(found[1].replace(",", ""))


def test_peak_memory_stays_below_the_budget(large_campaign: CampaignStore, tmp_path: Path) -> None:
    budget = 60 * MIB  # at 41, the least, it takes two minutes
    assert large_campaign.rows * large_campaign.example_count * 4 > 1.5 * budget
    peak = _peak(lambda: coar.fit(large_campaign, tmp_path / "a.zarr", memory=budget))
    assert peak < budget
    found = coar.open_attributions(tmp_path / "a.zarr")
    np.testing.assert_allclose(found.weights[:50], found.weights[EXAMPLES - 50 :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "rows", "components", "matrices", "on_disk"),
    [
        ("ridge", 260, 900, 2.0, True),
        ("ridge", 1300, 900, 7.0, False),
        ("ols", 1300, 900, 6.0, True),
        ("lasso", 1300, 400, 12.0, False),
    ],
    ids=["dual", "primal", "one penalty", "lasso"],
)
def test_the_stated_minimum_suffices(
    write_campaign: Callable[..., CampaignStore],
    draw_keep: Callable[..., npt.NDArray[np.bool_]],
    tmp_path: Path,
    method: Any,
    rows: int,
    components: int,
    matrices: float,
    on_disk: bool,
) -> None:
    keep = draw_keep(rows, components)
    outputs = keep[:, :12] + np.random.default_rng(2).normal(size=(rows, 12))
    campaign = write_campaign(keep, outputs)
    store = tmp_path / "a.zarr" if on_disk else None
    with pytest.raises(coar.FitError, match=f"too small to fit {components} components") as refused:
        coar.fit(campaign, store, method=method, memory=1)
    least = _least(refused)
    assert least < 64 * MIB + matrices * 8 * components**2, "it should be about what a few square matrices need"
    assert _peak(lambda: coar.fit(campaign, store, method=method, memory=least)) < least
    with pytest.raises(coar.FitError, match="too small"):
        coar.fit(campaign, method=method, memory=least - 1)


@pytest.mark.parametrize("method", ["ridge", "lasso"])
def test_slabs_stay_inside_the_budget(
    write_campaign: Callable[..., CampaignStore],
    draw_keep: Callable[..., npt.NDArray[np.bool_]],
    tmp_path: Path,
    method: Any,
) -> None:
    """Many examples at a time: what each of them takes is counted, too."""
    keep = draw_keep(400, 500)
    outputs = keep[:, :300] + np.random.default_rng(2).normal(size=(400, 300))
    campaign = write_campaign(keep, outputs)
    with pytest.raises(coar.FitError) as refused:
        coar.fit(campaign, tmp_path / "a.zarr", method=method, memory=1)
    found = re.search(r"needed, ([\d,]+) or more", str(refused.value))
    assert found is not None
    budget = int(found[1].replace(",", ""))  # for 64 examples
    base = _least(refused)
    peak = _peak(lambda: coar.fit(campaign, tmp_path / "a.zarr", method=method, memory=budget))
    assert coar.open_attributions(tmp_path / "a.zarr").store.block_examples == 64
    assert peak < budget
    assert peak > 32 * MIB / 8 + (budget - base) / 8, "the budget should not be many times what is needed"


def test_a_budget_too_small_says_what_is_needed(noisy: CampaignStore, tmp_path: Path) -> None:
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, memory=1_000_000)
    assert str(refused.value) == (
        "memory=1,000,000 bytes is too small to fit 12 components: at least 33,892,928 are needed, 37,437,056 or more "
        "are comfortable. Pass store=PATH so that the result need not be kept in memory."
    )
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, tmp_path / "a.zarr", memory=33_888_607)
    assert str(refused.value) == (
        "memory=33,888,607 bytes is too small to fit 12 components: at least 33,888,608 are needed, 37,432,736 or more "
        "are comfortable."
    )
    assert not (tmp_path / "a.zarr").exists()
