"""The book-keeping of workers: who lives, who holds which lease, what failed; clocks that lie change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from zarr.storage import LocalStore, MemoryStore

from stores import records
from stores.records import ENDED, RUNNING, STOPPED, Attempt, Process
from stores.storage import objects
from stores.work import worker as worker_module
from stores.work.worker import Worker
from stores.work.worklog import WorkLog, environments

LEASE = 60.0


class Clock:
    """A monotonic clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What `stores.work.worker` takes for the time that has passed."""
    found = Clock()
    monkeypatch.setattr(worker_module, "time", found)
    return found


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An empty zarr store, in memory or in a directory."""
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "s")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, for a minute at most."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def elsewhere(worker: Worker) -> None:
    """Lets a worker's record say that it is on another machine, where nobody can tell whether its process lives."""
    worker.record.process = replace(worker.record.process, host="elsewhere", machine="another start of another machine")
    worker._write()


def test_a_worker_tells_about_itself(store: Any) -> None:
    log = WorkLog(store)
    assert log.workers() == []
    with Worker(store, {"device": "cpu", "threads": 1}, LEASE) as worker:
        [record] = log.workers()
        assert record == worker.record
        assert (record.id, record.state, record.beat) == (worker.id, RUNNING, 1)
        assert record.process == Process.current()
        assert worker.id.startswith(f"{record.process.host}-{os.getpid()}-")
        worker.finished(rows=64, size=4096, seconds=1.5)
        worker.finished(rows=10, size=640, seconds=0.5)
    [record] = log.workers()
    assert (record.state, record.blocks, record.rows, record.bytes, record.seconds) == (ENDED, 2, 74, 4736, 2.0)
    assert record.beat == 2
    assert (record.facts, record.lease_seconds) == ({"device": "cpu", "threads": 1}, LEASE)
    assert record.began <= record.seen


def test_a_worker_that_ends_with_an_error_was_stopped(store: Any) -> None:
    with pytest.raises(KeyboardInterrupt), Worker(store, {}):
        raise KeyboardInterrupt
    assert [record.state for record in WorkLog(store).workers()] == [STOPPED]


def test_the_heart_beats_while_the_worker_works(store: Any) -> None:
    with Worker(store, {}, lease_seconds=0.08) as worker:
        deadline = time.monotonic() + 20
        while (record := WorkLog(store).worker(worker.id)) is not None and record.beat < 4:
            assert time.monotonic() < deadline, "no heart-beat"
            time.sleep(0.005)
    beat = worker.record.beat
    time.sleep(0.1)
    assert worker.record.beat == beat, "the heart beats on after the end"


def test_a_heart_beat_that_cannot_be_written_is_told_and_ends_nothing(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with Worker(store, {}, lease_seconds=0.04) as worker:
        worker.on_trouble = lambda error: told.append(str(error))

        def full(*_: object) -> None:
            raise OSError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(worker_module.objects, "replace", full)  # type: ignore[attr-defined]
            deadline = time.monotonic() + 20
            while len(told) < 2:
                assert time.monotonic() < deadline, "trouble was not told"
                time.sleep(0.005)
        assert worker.claim(0)
    assert set(told) == {"the disk is full"}


def test_one_block_one_worker(store: Any) -> None:
    with Worker(store, {}) as first, Worker(store, {}) as second:
        assert first.claim(3)
        assert first.claim(3), "its own lease holds"
        assert not second.claim(3)
        assert second.claim(4)
        leases = WorkLog(store).leases()
        assert {block: lease.worker for block, lease in leases.items()} == {3: first.id, 4: second.id}
        second.release(3)
        assert not second.claim(3), "only who holds a lease can give it back"
        first.release(3)
        assert second.claim(3)
        first.release(99)  # nothing is there: nothing happens


def test_a_lease_is_stale_when_its_worker_has_ended(store: Any) -> None:
    with Worker(store, {}) as first:
        first.claim(0)
    with Worker(store, {}) as second:
        assert second.claim(0)


def test_a_lease_is_stale_when_its_worker_was_never_heard_of(store: Any) -> None:
    lost = {"block": 0, "worker": "nobody", "since": "2020-01-01T00:00:00+00:00"}
    objects.create(store, "work/leases/0.json", objects.to_json(lost))
    objects.create(store, "work/leases/1.json", b"{ half a fi")
    with Worker(store, {}) as worker:
        assert worker.claim(0)
        assert worker.claim(1), "what cannot be read holds nobody back"


def test_a_lease_is_stale_at_once_when_its_process_on_this_machine_is_dead(
    store: Any, sleeper: subprocess.Popen[bytes], clock: Clock
) -> None:
    born = records._born(sleeper.pid)
    assert born is not None
    with Worker(store, {}, LEASE) as first, Worker(store, {}, LEASE) as second:
        first.record.process = replace(Process.current(), pid=sleeper.pid, born=born)
        first._write()
        assert first.claim(0)
        assert not second.claim(0)
        sleeper.kill()
        sleeper.wait()
        assert second.claim(0)


def test_a_process_id_that_is_used_again_is_another_process() -> None:
    mine = Process.current()
    assert not mine.is_known_dead()
    assert replace(mine, born="1").is_known_dead()
    assert not replace(mine, born="").is_known_dead(), "nobody knows when it was born"


def test_of_a_process_elsewhere_nobody_here_knows() -> None:
    mine = Process.current()
    assert not replace(mine, pid=2**22 + 1, machine="another").is_known_dead()
    assert not replace(mine, pid=2**22 + 1, machine="").is_known_dead()
    assert replace(mine, pid=2**22 + 1).is_known_dead()


def test_a_lease_is_stale_when_the_heart_has_not_beaten_for_its_time(store: Any, clock: Clock) -> None:
    with Worker(store, {}, LEASE) as first, Worker(store, {}, LEASE) as second:
        elsewhere(first)
        assert first.claim(0)
        assert not second.claim(0), "first look: from now on it counts"
        clock.now += LEASE - 1
        assert not second.claim(0)
        elsewhere(first)  # a beat
        clock.now += 2
        assert not second.claim(0), "it lives: the time counts anew"
        clock.now += LEASE - 1
        assert not second.claim(0)
        clock.now += 2
        assert second.claim(0)


def test_the_lease_time_that_counts_is_its_holders(store: Any, clock: Clock) -> None:
    with Worker(store, {}, lease_seconds=500) as first, Worker(store, {}, lease_seconds=5) as second:
        elsewhere(first)
        first.claim(0)
        assert not second.claim(0)
        clock.now += 499
        assert not second.claim(0)
        clock.now += 2
        assert second.claim(0)


@pytest.mark.parametrize("time_of_day", ["1970-01-01T00:00:00+00:00", "2199-12-31T23:59:59+00:00"])
def test_clocks_that_are_wrong_change_nothing(
    store: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, time_of_day: str
) -> None:
    """The holder's clock says another century, and goes back and forth: only the observer's own seconds count."""
    with Worker(store, {}, LEASE) as first, Worker(store, {}, LEASE) as second:
        monkeypatch.setattr(worker_module, "utc_now", lambda: time_of_day)
        elsewhere(first)
        assert first.claim(0)
        assert not second.claim(0)
        monkeypatch.setattr(worker_module, "utc_now", lambda: "2000-01-01T00:00:00+00:00")
        elsewhere(first)
        clock.now += LEASE - 1
        assert not second.claim(0)
        clock.now += LEASE
        assert not second.claim(0)
        clock.now += LEASE + 1
        assert second.claim(0)


def test_a_worker_that_wakes_up_after_its_lease_takes_nothing_back(store: Any, clock: Clock) -> None:
    with Worker(store, {}, LEASE) as sleepy, Worker(store, {}, LEASE) as second:
        elsewhere(sleepy)
        sleepy.claim(0)
        second.claim(0)
        clock.now += LEASE + 1
        assert second.claim(0)
        sleepy.release(0)
        assert WorkLog(store).leases()[0].worker == second.id, "it gave back what is another's"
        assert not sleepy.claim(0)


def test_two_that_see_a_lease_stale_at_once_do_not_both_get_it(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look of one and its delete, the other has taken the block."""
    with Worker(store, {}) as dead:
        dead.claim(0)
    with Worker(store, {}) as first, Worker(store, {}) as second:
        real = objects.create

        def create(place: Any, key: str, data: bytes) -> None:
            """Lets the second worker be faster, once, at the second try of the first one."""
            if first.id in data.decode() and not held and calls:
                held.append(second.claim(0))
            calls.append(key)
            real(place, key, data)

        held: list[bool] = []
        calls: list[str] = []
        monkeypatch.setattr(worker_module.objects, "create", create)  # type: ignore[attr-defined]
        assert not first.claim(0)
        assert held == [True]
        assert WorkLog(store).leases()[0].worker == second.id


def test_failures_are_counted_set_aside_and_forgotten(store: Any) -> None:
    log = WorkLog(store)
    tries = [Attempt(f"reason {i}", "ValueError", "w", "2026-01-01T00:00:00+00:00") for i in range(3)]
    assert log.failure(4) is None
    assert not log.add_failure(4, tries[0], set_aside=False).set_aside
    log.add_failure(4, tries[1], set_aside=False)
    failure = log.add_failure(4, tries[2], set_aside=True)
    assert (failure.block, failure.attempts, failure.set_aside) == (4, tuple(tries), True)
    log.add_failure(11, tries[0], set_aside=False)
    assert log.failures() == {4: failure, 11: log.failure(11)}
    log.forget_failure(11)
    log.forget_failure(11)  # nothing is there: nothing happens
    assert list(log.failures()) == [4]
    log.clear_failures()
    assert log.failures() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"block": 4}', '{"attempts": [{"why": 1}], "set_aside": true}'])
def test_book_keeping_that_cannot_be_read_counts_as_none(store: Any, text: str) -> None:
    for key in ("work/failures/4.json", "work/workers/w.json", "work/leases/4.json"):
        objects.replace(store, key, text.encode())
    log = WorkLog(store)
    assert (log.failures(), log.workers(), log.leases()) == ({}, [], {})


def test_records_of_another_version_are_read_as_far_as_they_go(store: Any) -> None:
    with Worker(store, {"device": "cpu"}) as worker:
        pass
    value = asdict(worker.record)
    del value["bytes"]
    objects.replace(store, "work/workers/later.json", json.dumps({**value, "id": "later", "mood": "good"}).encode())
    found = {record.id: record for record in WorkLog(store).workers()}
    assert found["later"].bytes == 0
    assert found["later"].facts == {"device": "cpu"}


def test_environments_are_told_once_each_oldest_first(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Callable[[], str] = iter(f"2026-01-01T00:00:{i:02d}+00:00" for i in range(60)).__next__
    monkeypatch.setattr(worker_module, "utc_now", times)
    for device in ("cuda:0", "cpu", "cuda:0"):
        with Worker(store, {"device": device}):
            pass
    assert environments({}, store) == [{"device": "cuda:0"}, {"device": "cpu"}]
    old = {"environments": [{"device": "old"}, {"device": "cpu"}]}
    assert environments(old, store) == [{"device": "old"}, {"device": "cpu"}, {"device": "cuda:0"}]
