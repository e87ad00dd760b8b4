"""What is written down when a worker dies: its block has failed once, its lease is stale, others' are untouched."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from zarr.storage import MemoryStore

from stores import CampaignStore
from stores.records import RUNNING, STOPPED, Attempt, Process
from stores.work.worker import Worker
from stores.work.worker_exits import KIND, forget_finished, record_stop, record_worker_death
from stores.work.worklog import WorkLog

HOST, PID = socket.gethostname(), 2**22 + 5
WHY = "The worker that computed it was killed by signal 9 (SIGKILL)."


@pytest.fixture
def store(new_campaign: Callable[..., CampaignStore]) -> CampaignStore:
    """An empty campaign of three blocks."""
    return new_campaign(MemoryStore())


def worker_of(store: CampaignStore, pid: int, host: str = HOST) -> Worker:
    """Returns a worker that says to be another process, and whose heart does not beat."""
    worker = Worker(store.blocks.store, {"device": "cpu"})
    worker.record.process = Process(host, pid, "a machine that is not this one", "1")
    worker._write()
    return worker


def states(store: CampaignStore) -> dict[str, str]:
    return {record.id: record.state for record in WorkLog(store.blocks.store).workers()}


def finish(store: CampaignStore, block: int) -> None:
    rows = store.span(block).stop - store.span(block).start
    store.write_block(block, np.ones((rows, 11), dtype=np.bool_), np.zeros((rows, 5), dtype=np.float32))


def test_a_death_is_a_failed_try_of_the_block_and_frees_it(store: CampaignStore) -> None:
    dead, other = worker_of(store, PID), worker_of(store, PID + 1)
    assert dead.claim(1)
    assert other.claim(2)
    with Worker(store.blocks.store, {}) as mine:
        assert not mine.claim(1)
        [failure] = record_worker_death(store.blocks, HOST, PID, WHY)
        assert (failure.block, failure.set_aside, len(failure.attempts)) == (1, False, 1)
        attempt = failure.attempts[0]
        assert (attempt.why, attempt.kind, attempt.worker) == (WHY, KIND, dead.id)
        assert (states(store)[dead.id], states(store)[other.id]) == (STOPPED, RUNNING)
        assert mine.claim(1), "no lease time has to pass"
        assert not mine.claim(2)
    assert record_worker_death(store.blocks, HOST, PID, WHY) == [], "one death is told once"


def test_the_third_death_at_one_block_sets_it_aside(store: CampaignStore) -> None:
    asides = []
    for pid in range(PID, PID + 3):
        assert worker_of(store, pid).claim(0)
        asides += [failure.set_aside for failure in record_worker_death(store.blocks, HOST, pid, WHY)]
    assert asides == [False, False, True]


def test_a_death_after_the_mark_is_no_failure(store: CampaignStore) -> None:
    dead = worker_of(store, PID)
    dead.claim(1)
    finish(store, 1)
    assert record_worker_death(store.blocks, HOST, PID, WHY) == []
    assert states(store)[dead.id] == STOPPED


@pytest.mark.parametrize(
    ("host", "pid"), [("another", PID), (HOST, os.getpid())], ids=["another host", "another process"]
)
def test_another_process_is_not_meant(store: CampaignStore, host: str, pid: int) -> None:
    living = worker_of(store, PID)
    living.claim(0)
    assert record_worker_death(store.blocks, host, pid, WHY) == []
    assert states(store)[living.id] == RUNNING


def test_ended_on_purpose_is_no_failure(store: CampaignStore) -> None:
    ended = worker_of(store, PID)
    ended.claim(0)
    record_stop(store.blocks, HOST, PID)
    log: Any = WorkLog(store.blocks.store)
    assert (states(store)[ended.id], log.failures()) == (STOPPED, {})
    with Worker(store.blocks.store, {}) as mine:
        assert mine.claim(0)


def test_failures_of_blocks_that_were_finished_after_all_are_forgotten(store: CampaignStore) -> None:
    log = WorkLog(store.blocks.store)
    for block in (0, 2):
        log.add_failure(block, Attempt(WHY, KIND, "w", "2026-01-01T00:00:00+00:00"), set_aside=False)
    finish(store, 0)
    assert list(forget_finished(store.blocks)) == [2]
    assert list(log.failures()) == [2]
