"""The snapshot of a store: counts, workers, speed, what is left, what failed and why; reading it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from zarr.storage import MemoryStore, ObjectStore

import ablate
from ablate.work.status import ALIVE, LOST, SILENT, Status, Watch, status
from stores import AttributionStore, CampaignStore, StoreNotFoundError, StoreUnreadableError
from stores.records import Attempt, Process, WorkerRecord, utc_now
from stores.storage import objects
from stores.work.worker import Worker
from stores.work.worklog import LEASES, WORKERS, WorkLog

ELSEWHERE = Process("node7", 17, "another machine", "1")


@pytest.fixture
def empty(tmp_path: Path) -> CampaignStore:
    """A campaign of 10 rows in blocks of 4, 4 and 2; 3 components, 5 examples; nothing is finished."""
    return CampaignStore.create(
        tmp_path / "campaign.zarr",
        header={"spec": {"rows": 10}, "identity": {"versions": {"torch": "2.0"}}},
        components={"id": np.arange(3)},
        examples={"id": np.arange(5)},
        rows=10,
        block_rows=4,
    )


def write(store: CampaignStore, *blocks: int) -> None:
    for block in blocks:
        span = store.span(block)
        rows = span.stop - span.start
        assert store.write_block(block, np.ones((rows, 3), dtype=np.bool_), np.ones((rows, 5), dtype=np.float32))


def record(store: CampaignStore, name: str, process: Process, **changes: Any) -> WorkerRecord:
    """Writes a worker's record, as it would, and returns it."""
    found = replace(WorkerRecord(name, process, utc_now(), utc_now(), {"device": "cuda:0"}), **changes)
    objects.replace(store.blocks.store, f"{WORKERS}/{name}.json", objects.to_json(asdict(found)))
    return found


def lease(store: CampaignStore, block: int, worker: str) -> None:
    value = {"block": block, "worker": worker, "since": utc_now()}
    objects.replace(store.blocks.store, f"{LEASES}/{block}.json", objects.to_json(value))


def states(found: Status) -> dict[str, str]:
    return {worker.id: worker.state for worker in found.workers}


class Peek(ablate.Output):
    """A margin that looks at the store while the campaign runs."""

    name = "margin"

    def __init__(self, place: Any) -> None:
        self.place = place
        self.seen: list[Status] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if len(targets) == 5:
            self.seen.append(status(self.place))
        return ablate.Margin()(logits, targets)


def _object_storage() -> Any:
    """A zarr store over an object storage library, which keeps its objects in memory."""
    return ObjectStore(pytest.importorskip("obstore.store").MemoryStore())


@pytest.mark.parametrize("make", [None, MemoryStore, _object_storage], ids=["folder", "memory", "object storage"])
def test_a_campaign_while_it_runs_and_after(mlp: nn.Module, tmp_path: Path, make: Callable[[], Any] | None) -> None:
    place: Any = tmp_path / "campaign.zarr" if make is None else make()
    output = Peek(place)
    data = (np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32), [0, 1, 2, 0, 1])
    spec = ablate.CampaignSpec(
        model=mlp, data=data, rows=7, block_rows=3, ablate_fraction=0.2, batch_size=5, output=output
    )
    ablate.run(spec, place, progress=False)
    during = [found for found in output.seen if found.workers]
    assert [found.finished_rows for found in during] == [0, 0, 0, 3, 3, 3, 6]
    assert {(found.running_blocks, found.left_blocks) for found in during} == {(1, 3), (1, 2), (1, 1)}
    assert all(found.workers[0].at == found.finished_blocks for found in during)
    assert {states(found)[found.workers[0].id] for found in during} == {ALIVE}
    after = status(place)
    assert (after.complete, after.settled, after.kind, after.unit) == (True, True, "campaign", "row")
    assert (after.finished_rows, after.rows, after.finished_blocks, after.blocks) == (7, 7, 3, 3)
    assert (after.running_blocks, after.left_blocks, after.examples, after.components) == (0, 0, 5, 9)
    (worker,) = after.workers
    assert (worker.state, worker.rows, worker.blocks, worker.at, worker.device) == ("ended", 7, 3, None, "cpu")
    assert (worker.pid, worker.host) == (os.getpid(), Process.current().host)
    assert worker.rows_per_second is not None
    assert worker.rows_per_second > 0
    assert after.rows_per_second is None  # nobody is at it
    assert (after.eta_seconds, after.worker_hours_left) == (0, 0)
    assert after.spec["rows"] == 7
    assert set(after.versions) == {"component-attribution", "torch", "numpy", "zarr"}
    assert after.bytes is not None
    if make is None:
        assert after.bytes == sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    assert json.loads(json.dumps(after.describe()))["workers"][0]["rows"] == 7


def test_attributions(tmp_path: Path) -> None:
    store = AttributionStore.create(
        tmp_path / "a.zarr",
        header={"spec": {}, "identity": {}},
        components={"id": np.arange(2)},
        examples={"id": np.arange(5)},
        block_examples=3,
    )
    values = {"weights": np.ones((2, 2)), "stderr": np.ones((2, 2)), "bias": np.ones(2)}
    values |= {f"quality/{name}": np.ones(2) for name in store.quality_names}
    store.write_block(1, values)
    found = status(tmp_path / "a.zarr")
    assert (found.kind, found.unit, found.complete) == ("attributions", "example", False)
    assert (found.finished_rows, found.rows, found.examples, found.components) == (2, 5, 5, 2)
    assert (found.finished_blocks, found.blocks, found.versions) == (1, 2, {})


def test_workers_at_their_blocks_and_what_is_left(empty: CampaignStore) -> None:
    write(empty, 0)
    with Worker(empty.blocks.store, {"device": "cpu"}) as worker:
        assert worker.claim(1)
        record(empty, "ended", ELSEWHERE, state="ended", rows=4, blocks=1, seconds=2.0)
        record(empty, "alive", ELSEWHERE, rows=4, blocks=1, seconds=1.0)
        lease(empty, 0, "alive")  # finished, not yet given back
        lease(empty, 2, "ended")  # stale
        found = status(empty.location)
    assert states(found) == {worker.id: ALIVE, "ended": "ended", "alive": ALIVE}
    assert {w.id: w.at for w in found.workers} == {worker.id: 1, "ended": 2, "alive": None}
    assert (found.running_blocks, found.left_blocks, found.finished_rows) == (1, 2, 4)
    assert found.rows_per_second == pytest.approx(4.0)  # of the one alive that has finished a block
    assert found.eta_seconds == pytest.approx(6 / 4)
    assert found.worker_hours_left == pytest.approx(6 / (8 / 3) / 3600)


def test_a_worker_whose_process_is_dead_is_lost(empty: CampaignStore) -> None:
    here = Process.current()
    if not here.machine:
        pytest.skip("this system does not tell which process is which")
    record(empty, "dead", replace(here, born="1"), rows=4, seconds=1.0)  # the process id was used again
    lease(empty, 0, "dead")
    found = status(empty.location)
    assert states(found) == {"dead": LOST}
    assert (found.running_blocks, found.rows_per_second, found.eta_seconds) == (0, None, None)
    assert found.worker_hours_left == pytest.approx(10 / 4 / 3600)


def test_a_worker_elsewhere_is_judged_by_its_beats_alone_when_watched(empty: CampaignStore) -> None:
    now = [100.0]
    old = (datetime.now(UTC) - timedelta(days=3)).isoformat(timespec="seconds")
    future = (datetime.now(UTC) + timedelta(days=3)).isoformat(timespec="seconds")
    record(empty, "clock late", ELSEWHERE, seen=old, lease_seconds=60.0)
    record(empty, "clock early", ELSEWHERE, seen=future, lease_seconds=60.0)
    watch = Watch(empty.location, clock=lambda: now[0])
    found = watch.look()
    assert states(found) == {"clock late": SILENT, "clock early": ALIVE}
    ago = {worker.id: worker.seen_seconds_ago for worker in found.workers}
    assert ago["clock late"] == pytest.approx(3 * 86400, abs=60)
    now[0] += 50
    record(empty, "clock late", ELSEWHERE, seen=old, lease_seconds=60.0, beat=1)
    assert states(watch.look()) == {"clock late": ALIVE, "clock early": ALIVE}
    now[0] += 20
    assert states(watch.look()) == {"clock late": ALIVE, "clock early": LOST}
    now[0] += 50
    assert states(watch.look()) == {"clock late": LOST, "clock early": LOST}
    record(empty, "clock early", ELSEWHERE, seen=future, lease_seconds=60.0, beat=1)
    assert states(watch.look())["clock early"] == ALIVE  # it woke up


def test_failed_blocks_say_why_and_what_to_do(empty: CampaignStore) -> None:
    write(empty, 0)
    record(empty, "w", ELSEWHERE, rows=4, seconds=1.0)
    log = WorkLog(empty.blocks.store)
    log.add_failure(0, Attempt("RuntimeError: once", "RuntimeError", "w", utc_now()), False)  # finished since
    for _ in range(3):
        attempt = Attempt("OutOfMemoryError: 3 GiB", "OutOfMemoryError", "w", "2030-01-02T03:04:05+00:00")
        log.add_failure(1, attempt, True)
    log.add_failure(2, Attempt("RuntimeError: odd", "RuntimeError", "v", utc_now()), False)
    found = status(empty.location)
    assert (found.failed_blocks, found.set_aside_blocks, found.left_blocks) == (1, 1, 1)
    first, second = found.failures
    assert (first.block, first.first, first.last, first.attempts, first.set_aside) == (1, 4, 7, 3, True)
    assert (first.why, first.worker, first.time) == ("OutOfMemoryError: 3 GiB", "w", "2030-01-02T03:04:05+00:00")
    assert first.advice == (
        "Give the run a smaller batch_size or memory_budget, or a device with more memory. Remove the cause and run "
        "the same command again: it tries the block anew."
    )
    assert (second.block, second.why, second.set_aside) == (2, "RuntimeError: odd", False)
    assert second.advice == ("It is tried again by itself while workers run; else by the next run of the same command.")
    assert found.eta_seconds == pytest.approx(2 / 4)  # what is set aside is not waited for
    write(empty, 2)
    assert status(empty.location).settled
    assert not status(empty.location).complete


def test_a_lost_file_is_told_not_raised(empty: CampaignStore) -> None:
    write(empty, 0, 1, 2)
    (Path(str(empty.location)) / "outputs" / "c" / "1" / "0").unlink()
    found = status(empty.location)
    assert (found.finished_blocks, found.complete, found.settled) == (3, False, True)
    (said,) = found.damaged
    assert said.startswith(
        f"{empty.location}: block 1 (rows 4 to 7) is damaged: the file of 'outputs' is gone (outputs/c/1/0)."
    )


def test_damaged_marks_are_told_not_raised(empty: CampaignStore) -> None:
    write(empty, 0, 1, 2)
    for block in (0, 2):
        (Path(str(empty.location)) / "ledger" / "c" / str(block) / "0").write_bytes(b"short")
    found = status(empty.location)
    assert (found.finished_blocks, found.finished_rows, found.complete) == (1, 4, False)
    assert [said.split(" is damaged: ")[0] for said in found.damaged] == [
        f"{empty.location}: block 0 (rows 0 to 3)",
        f"{empty.location}: block 2 (rows 8 to 9)",
    ]


def test_a_watch_sees_what_others_finish(empty: CampaignStore) -> None:
    watch = Watch(empty.location)
    first = watch.look()
    write(empty, 0, 1)
    second = watch.look()
    assert (first.finished_blocks, second.finished_blocks) == (0, 2)
    assert first.bytes is not None
    assert second.bytes is not None
    assert second.bytes > first.bytes


def test_reading_changes_nothing(empty: CampaignStore, tmp_path: Path) -> None:
    write(empty, 1)
    record(empty, "w", replace(Process.current(), born="1"))
    lease(empty, 0, "w")
    path = Path(str(empty.location))

    def state() -> dict[str, tuple[bytes, int]]:
        return {
            str(f.relative_to(path)): (f.read_bytes(), f.stat().st_mtime_ns) for f in path.rglob("*") if f.is_file()
        }

    before = state()
    status(path)
    assert state() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["campaign.zarr"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda value: value | {"rows": "many"},
        lambda value: value | {"seen": 3},
        lambda value: value | {"facts": []},
        lambda value: {"id": "w"},
        lambda value: [],
    ],
)
def test_book_keeping_that_is_none_is_left_out(empty: CampaignStore, break_it: Callable[[Any], Any]) -> None:
    good = asdict(record(empty, "good", ELSEWHERE))
    objects.replace(empty.blocks.store, f"{WORKERS}/bad.json", objects.to_json(break_it(good)))
    lease(empty, 77, "good")
    objects.replace(
        empty.blocks.store, "work/failures/0.json", objects.to_json({"block": 0, "attempts": [], "set_aside": True})
    )
    found = status(empty.location)
    assert [worker.id for worker in found.workers] == ["good"]
    assert (found.running_blocks, found.set_aside_blocks) == (0, 0)


def test_nothing_there_or_something_else(tmp_path: Path, empty: CampaignStore) -> None:
    with pytest.raises(StoreNotFoundError, match=r"No campaign store at .*none: nothing is there"):
        status(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StoreUnreadableError, match="is a file, expected the directory"):
        status(tmp_path / "file")
    copied = tmp_path / "copied"
    shutil.copytree(str(empty.location), copied)
    metadata = json.loads((copied / "zarr.json").read_text())
    metadata["attributes"]["format"] = "poems"
    (copied / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreUnreadableError, match="is no campaign store: its format is 'poems'"):
        status(copied)
    (copied / "zarr.json").write_text("{")
    with pytest.raises(StoreUnreadableError, match="cannot be read as a campaign store"):
        status(copied)
