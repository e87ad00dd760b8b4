"""Law 6: a fit stays inside its memory budget, however large the campaign is."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import coar
from stores import CampaignStore

ROWS, EXAMPLES, COMPONENTS, BLOCK = 10_000, 4000, 24, 250
MIB = 2**20


@pytest.fixture(scope="module")
def large_campaign(
    tmp_path_factory: pytest.TempPathFactory,
    write_campaign: Callable[..., CampaignStore],
    draw_keep: Callable[..., npt.NDArray[np.bool_]],
) -> CampaignStore:
    """160 MB of outputs on disk, made from a few examples that repeat."""
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
    budget = 72 * MIB
    assert large_campaign.rows * large_campaign.example_count * 4 > 2 * budget
    peak = _peak(lambda: coar.fit(large_campaign, tmp_path / "a.zarr", memory=budget))
    assert peak < budget
    found = coar.open_attributions(tmp_path / "a.zarr")
    np.testing.assert_allclose(found.weights[:50], found.weights[EXAMPLES - 50 :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_stated_minimum_suffices(
    write_campaign: Callable[..., CampaignStore],
    draw_keep: Callable[..., npt.NDArray[np.bool_]],
    tmp_path: Path,
    on_disk: bool,
) -> None:
    keep = draw_keep(260, 900)
    outputs = keep[:, :12] + np.random.default_rng(2).normal(size=(260, 12))
    campaign = write_campaign(keep, outputs)
    store = tmp_path / "a.zarr" if on_disk else None
    with pytest.raises(coar.FitError, match="too small to fit 900 components") as refused:
        coar.fit(campaign, store, memory=1)
    least = _least(refused)
    assert least < 32 * MIB + 9 * 8 * 900**2, "it should be about what seven square matrices need"
    assert _peak(lambda: coar.fit(campaign, store, memory=least)) < least
    with pytest.raises(coar.FitError, match="too small"):
        coar.fit(campaign, memory=least - 1)


def test_a_budget_too_small_says_what_is_needed(noisy: CampaignStore, tmp_path: Path) -> None:
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, memory=1_000_000)
    assert str(refused.value) == (
        "memory=1,000,000 bytes is too small to fit 12 components: at least 33,599,080 are needed, 33,774,976 or more "
        "are comfortable. Pass store=PATH so that the result need not be kept in memory."
    )
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, tmp_path / "a.zarr", memory=33_594_759)
    assert str(refused.value) == (
        "memory=33,594,759 bytes is too small to fit 12 components: at least 33,594,760 are needed, 33,770,656 or more "
        "are comfortable."
    )
    assert not (tmp_path / "a.zarr").exists()
