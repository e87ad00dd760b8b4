"""A regression on a campaign that still runs: exactly the blocks that are finished, and it says how many."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coar
import stores
from stores import CampaignStore

pytestmark = pytest.mark.faults


def test_a_fit_on_a_running_campaign_is_that_of_its_finished_blocks(
    tmp_path: Path, victim: Any, undisturbed: Path
) -> None:
    path = tmp_path / "campaign.zarr"
    process = victim(path, delay=0.06)
    deadline = time.monotonic() + 60
    while len(list((path / "ledger" / "c").glob("*/0"))) < 3:
        assert time.monotonic() < deadline, "never finished three blocks"
        time.sleep(0.01)

    before = CampaignStore.open(path).finished_rows
    fitted = coar.fit(path, tmp_path / "fitted.zarr", held_out=False)
    after = CampaignStore.open(path).finished_rows

    rows = fitted.header["identity"]["rows"]
    assert 21 <= len(before) <= rows <= len(after)
    process.kill()
    assert process.wait() == -9, "the campaign ran while it was fitted"
    assert len(after) < 40

    # the same rows of the finished campaign, and no others, give the same attributions
    whole = CampaignStore.open(undisturbed)
    chosen = after[:rows]  # one worker finishes blocks in order
    assert len(chosen) == rows
    part = CampaignStore.create(
        tmp_path / "part.zarr",
        header=whole.header,
        components=whole.components,
        examples=whole.examples,
        rows=40,
        block_rows=7,
    )
    for block in range(-(-rows // 7)):
        part.write_block(block, *whole.read_block(block))
    again = coar.fit(part, held_out=False)
    assert again.header["identity"]["rows"] == rows
    assert again.header["identity"]["campaign"] == fitted.header["identity"]["campaign"]
    np.testing.assert_array_equal(again.weights[:], fitted.weights[:])
    assert stores.verify(tmp_path / "fitted.zarr").sound
