"""A real `kill -9` of an estimate at any moment: the same command finishes it, with the bytes of one never killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import stores
from stores import AttributionStore
from tests import forking
from tests.forking import Told

pytestmark = pytest.mark.faults

PROGRAM = """
import sys, time, runpy
import coar
victim = runpy.run_path(sys.argv[2])
model, delay = victim["small_model"](), float(sys.argv[3])
model.register_forward_pre_hook(lambda module, inputs: time.sleep(delay))
coar.estimate(model, victim["small_examples"](), passes=6, ablate_fraction=0.2, seed=5, quality_rows=10,
    block_examples=2, store=sys.argv[1])
"""


def _start(path: Path, delay: float) -> Told:
    """Returns a process that is about to estimate into `path`; each forward takes `delay` seconds longer."""
    return forking.start("-c", PROGRAM, path, Path(__file__).with_name("victim.py"), delay, strict=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store of the estimate. Not to be changed."""
    path = tmp_path_factory.mktemp("undisturbed") / "a.zarr"
    assert _start(path, 0.0).wait(60) == 0
    return path


def _files(path: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {n: data for n, data in found.items() if not (n.endswith(".partial") or n.startswith("work/"))}


def _check_finished_blocks(path: Path, undisturbed: Path) -> int:
    """Compares the checksums of the finished blocks with those of the undisturbed run; returns how many there are."""
    store, whole = AttributionStore.open(path, finish=True), AttributionStore.open(undisturbed)
    finished = store.blocks.finished()
    np.testing.assert_array_equal(store.blocks.digests()[finished], whole.blocks.digests()[finished])
    return int(finished.sum())


def _kill(process: Told) -> None:
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_and_the_same_estimate_again(tmp_path: Path, undisturbed: Path) -> None:
    path = tmp_path / "a.zarr"
    process = _start(path, 0.02)
    deadline = time.monotonic() + 60
    while len(list((path / "ledger" / "c").glob("*/0"))) < 2:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "never finished a block"
        time.sleep(0.005)
    _kill(process)
    assert 2 <= _check_finished_blocks(path, undisturbed) < 5
    assert _start(path, 0.0).wait(60) == 0
    assert _files(path) == _files(undisturbed)
    assert stores.verify(path).sound


@pytest.mark.slow
def test_killed_again_and_again_at_random(tmp_path: Path, undisturbed: Path) -> None:
    path, moments = tmp_path / "a.zarr", random.Random(3)  # noqa: S311
    finished = 0
    for _ in range(5):
        process = _start(path, 0.03)
        time.sleep(moments.uniform(0.0, 1.0))
        if process.poll() is not None:
            assert process.wait(60) == 0
            break
        _kill(process)
        if path.exists():
            before, finished = finished, _check_finished_blocks(path, undisturbed)
            assert finished >= before, "what was finished stays"
    assert _start(path, 0.0).wait(60) == 0
    assert _files(path) == _files(undisturbed)
