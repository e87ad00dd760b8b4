"""Handing out blocks: everyone begins elsewhere, nobody takes what others are at, all is handed out in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from zarr.storage import MemoryStore

from stores import CampaignStore
from stores.work import queue
from stores.work.queue import BlockQueue
from stores.work.worker import Worker
from stores.work.worklog import WorkLog

Make = Callable[..., BlockQueue]
BLOCKS = 8


@pytest.fixture
def store(new_campaign: Callable[..., CampaignStore]) -> CampaignStore:
    """An empty campaign of eight blocks of two rows, on five examples."""
    return new_campaign(MemoryStore(), rows=2 * BLOCKS, block_rows=2, components=3)


@pytest.fixture
def make(store: CampaignStore) -> Iterator[Make]:
    """`make(i, n)`: the queue of worker i of n, a new worker."""
    with ExitStack() as stack:

        def queue_of(i: int = 0, n: int = 1, aside: Callable[[], set[int]] = lambda: set()) -> BlockQueue:
            return BlockQueue(store.blocks, stack.enter_context(Worker(store.blocks.store, {})), (i, n), aside)

        yield queue_of


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long a queue has waited, nap by nap; it does not really wait."""
    found: list[float] = []
    monkeypatch.setattr(queue, "time", SimpleNamespace(sleep=found.append))
    return found


def finish(store: CampaignStore, block: int) -> None:
    keep = np.ones((2, 3), dtype=np.bool_)
    store.write_block(block, keep, np.full((2, 5), block, dtype=np.float32))


def work(store: CampaignStore, from_: BlockQueue, most: int = BLOCKS) -> list[int]:
    """Takes blocks, finishes them and gives them back; returns them in order."""
    done: list[int] = []
    while len(done) < most and (block := from_.next()) is not None:
        finish(store, block)
        from_.finished.add(block)
        from_._worker.release(block)
        done.append(block)
    return done


def test_one_worker_takes_all_in_order(store: CampaignStore, make: Make) -> None:
    assert work(store, make()) == list(range(BLOCKS))
    assert make().next() is None
    assert WorkLog(store.blocks.store).leases() == {}


@pytest.mark.parametrize(("worker", "first"), [((0, 3), 0), ((1, 3), 2), ((2, 3), 5), ((3, 100), 0), ((99, 100), 7)])
def test_everyone_begins_at_their_share_and_takes_all_in_the_end(
    store: CampaignStore, make: Make, worker: tuple[int, int], first: int
) -> None:
    assert work(store, make(*worker)) == [*range(first, BLOCKS), *range(first)]


def test_two_workers_share(store: CampaignStore, make: Make, naps: list[float]) -> None:
    queues = [make(0, 2), make(1, 2)]
    done: list[list[int]] = [[], []]
    for i in (0, 1, 0, 1, 1, 1, 1, 0):
        done[i] += work(store, queues[i], 1)
    assert done == [[0, 1, 3], [4, 5, 6, 7, 2]]
    assert [q.next() for q in queues] == [None, None]
    assert naps == []


def test_finished_blocks_are_not_handed_out(store: CampaignStore, make: Make) -> None:
    for block in (0, 3, 7):
        finish(store, block)
    mine = make()
    finish(store, 5)  # by another, after the queue looked
    assert work(store, mine) == [1, 2, 4, 6]


def test_a_block_that_was_finished_between_look_and_claim_is_given_back(store: CampaignStore, make: Make) -> None:
    mine = make()
    finish(store, 0)
    assert mine.next() == 1
    assert list(WorkLog(store.blocks.store).leases()) == [1]


def test_a_block_that_is_not_finished_is_handed_out_again(store: CampaignStore, make: Make) -> None:
    """It failed: its lease was given back."""
    mine = make()
    assert mine.next() == 0
    mine._worker.release(0)
    assert mine.next() == 0


def test_the_last_block_is_anothers_wait_until_it_is_finished(
    store: CampaignStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = make(0, 2), make(1, 2)
    assert others.next() == 4
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            finish(store, 4)
            others._worker.release(4)

    monkeypatch.setattr(queue, "time", SimpleNamespace(sleep=nap))
    assert work(store, mine) == [0, 1, 2, 3, 5, 6, 7]
    assert naps == [1.0] * 3


def test_the_last_block_is_that_of_a_worker_that_ended(
    store: CampaignStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make()
    lost = Worker(store.blocks.store, {})
    lost.__enter__()
    assert lost.claim(2)
    monkeypatch.setattr(queue, "time", SimpleNamespace(sleep=lambda seconds: lost.__exit__(None, None, None)))
    assert work(store, mine) == [0, 1, 3, 4, 5, 6, 7, 2]


def test_blocks_that_were_set_aside_are_left_out_and_not_waited_for(
    store: CampaignStore, make: Make, naps: list[float]
) -> None:
    aside = {1, 6}
    others = make()
    assert others._worker.claim(6)  # somebody is at it all the same
    mine = make(aside=lambda: aside)
    assert work(store, mine, 3) == [0, 2, 3]
    aside.add(4)  # meanwhile
    assert work(store, mine) == [5, 7]
    assert mine.next() is None
    assert naps == []


def test_many_workers_at_once_do_every_block_once(
    store: CampaignStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
    done: list[list[int]] = [[] for _ in range(4)]
    queues = [make(i, 4) for i in range(4)]
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            done[i] = work(store, queues[i])
        except BaseException as error:
            errors.append(error)

    threads: list[Any] = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert sorted(block for blocks in done for block in blocks) == list(range(BLOCKS))
    assert store.missing_blocks() == []
