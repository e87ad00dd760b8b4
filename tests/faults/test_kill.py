"""A real `kill -9` at any moment: what was finished is data, the rest is nothing, and the same command finishes it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import ablate
from stores import CampaignStore, StoreNotFoundError
from tests.forking import Told

pytestmark = pytest.mark.faults

VICTIM = Path(__file__).with_name("victim.py")
Files = Callable[[Path], dict[str, bytes]]


def _marks(store: Path) -> int:
    return len(list((store / "ledger" / "c").glob("*/0")))


def _check_finished_blocks_only(path: Path, undisturbed: Path) -> CampaignStore:
    """Opens the store and compares what it shows as data with the undisturbed run's."""
    store, whole = CampaignStore.open(path), CampaignStore.open(undisturbed)
    rows = store.finished_rows
    assert store.progress.finished_rows == len(rows) == len(store.outputs) == len(store.keep)
    np.testing.assert_array_equal(store.outputs[:], whole.outputs[rows])
    np.testing.assert_array_equal(store.keep[:], whole.keep[rows])
    for block in store.finished_blocks():
        np.testing.assert_array_equal(store.read_block(block)[1], whole.read_block(block)[1])
    return store


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(
    tmp_path: Path, victim: Callable[..., Told], undisturbed: Path, files: Files
) -> None:
    path = tmp_path / "campaign.zarr"
    command = [sys.executable, "-W", "error", str(VICTIM), str(path), str(torch.get_num_threads()), "0.02"]

    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while _marks(path) < 2:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline, "never finished a block"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    store = _check_finished_blocks_only(path, undisturbed)
    assert 2 <= store.progress.finished_blocks < 6
    assert not store.progress.complete

    assert victim(path).wait(60) == 0

    assert files(path) == files(undisturbed)


@pytest.mark.parametrize(
    ("point", "finished"),
    [
        ("draft begun", None),
        ("draft complete", None),
        ("store made", []),
        ("block claimed", [0, 1, 2]),
        ("outputs written, keep not", [0, 1, 2]),
        ("data written, not flushed", [0, 1, 2]),
        ("data flushed, mark not written", [0, 1, 2]),
        ("mark written, not flushed", [0, 1, 2, 3]),
        ("mark flushed", [0, 1, 2, 3]),
        ("last data flushed, mark not written", [0, 1, 2, 3, 4]),
    ],
)
def test_killed_at_a_chosen_point(
    tmp_path: Path,
    victim: Callable[..., Told],
    undisturbed: Path,
    small_spec: Callable[..., ablate.CampaignSpec],
    files: Files,
    point: str,
    finished: list[int] | None,
) -> None:
    path = tmp_path / "campaign.zarr"
    assert victim(path, point=point).wait(60) == -signal.SIGKILL

    if finished is None:
        with pytest.raises(StoreNotFoundError, match="nothing is there"):
            CampaignStore.open(path)
        assert [p.suffix for p in tmp_path.iterdir()] == [".draft"]
    else:
        assert _check_finished_blocks_only(path, undisturbed).finished_blocks() == finished

    ablate.run(small_spec(), path, progress=False)

    assert files(path) == files(undisturbed)
    assert list(tmp_path.iterdir()) == [path], "a killed program's draft is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_at_random(
    tmp_path: Path, victim: Callable[..., Told], undisturbed: Path, files: Files, seed: int
) -> None:
    path = tmp_path / "campaign.zarr"
    moments = random.Random(seed)  # noqa: S311
    for kills in range(8):
        process = victim(path, delay=0.05)
        time.sleep(moments.uniform(0.0, 0.8))
        process.kill()
        assert process.wait() == -signal.SIGKILL or kills > 0  # all of it takes 2 seconds
        if path.exists():
            _check_finished_blocks_only(path, undisturbed)

    assert victim(path).wait(60) == 0
    assert files(path) == files(undisturbed)
