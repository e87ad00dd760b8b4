"""Clocks that jump: they date records for people and decide nothing, so that no number and no block depends on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from zarr.storage import LocalStore

import ablate
import stores
from stores import CampaignStore, WorkLog
from stores.records import Lease, Process, WorkerRecord
from stores.storage import objects

pytestmark = pytest.mark.faults

SmallSpec = Callable[..., ablate.CampaignSpec]
Files = Callable[[Path], dict[str, bytes]]
Unfinish = Callable[..., None]
FUTURE, PAST = "2999-12-31T23:59:59+00:00", "1970-01-01T00:00:00+00:00"


@pytest.mark.parametrize(("first", "second"), [(FUTURE, PAST), (PAST, FUTURE)])
def test_a_clock_that_was_set_back_changes_no_number(
    tmp_path: Path,
    small_spec: SmallSpec,
    undisturbed: Path,
    files: Files,
    unfinish: Unfinish,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
) -> None:
    path = tmp_path / "a.zarr"
    for now, missing in ((first, [1, 4]), (second, [])):
        with monkeypatch.context() as patch:
            patch.setattr("stores.work.worker.utc_now", lambda now=now: now)
            ablate.run(small_spec(), path, progress=False)
        unfinish(path, missing)

    assert files(path) == files(undisturbed)
    records = WorkLog(LocalStore(path)).workers()
    assert sorted((record.began, record.blocks) for record in records) == sorted([(first, 6), (second, 2)])


def _hold(path: Path, process: Process, seen: str) -> None:
    """Leaves block 2 leased to a worker that is said to run."""
    store = LocalStore(path)
    record = WorkerRecord("other", process, seen, seen, {}, lease_seconds=0.5)
    objects.replace(store, "work/workers/other.json", objects.to_json(asdict(record)))
    objects.replace(store, "work/leases/2.json", objects.to_json(asdict(Lease(2, "other", seen))))


@pytest.mark.parametrize("seen", [FUTURE, PAST])
@pytest.mark.parametrize("here", [True, False])
def test_a_lease_from_the_future_of_a_worker_that_is_gone_is_taken_over(
    tmp_path: Path,
    small_spec: SmallSpec,
    undisturbed: Path,
    finished: CampaignStore,
    files: Files,
    unfinish: Unfinish,
    seen: str,
    here: bool,
) -> None:
    path = Path(finished.where)
    unfinish(path, [2])
    own = Process.current()
    _hold(path, Process(own.host, 2**30, own.machine, "1") if here else Process("other", 7, "other", "1"), seen)

    ablate.run(small_spec(), path, progress=False, lease_seconds=0.5)

    assert files(path) == files(undisturbed)
    assert WorkLog(LocalStore(path)).leases() == {}


def test_files_from_the_future_are_data_all_the_same(finished: CampaignStore, undisturbed: Path) -> None:
    path = Path(finished.where)
    for file in path.rglob("*"):
        os.utime(file, (32_000_000_000, 32_000_000_000))

    assert stores.verify(path).sound
    assert stores.repair(path).removed == ()
    assert CampaignStore.open(path).outputs[:].tobytes() == CampaignStore.open(undisturbed).outputs[:].tobytes()
