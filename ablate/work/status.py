"""A snapshot of a store: how far it is, who works on it, what failed and what to do. Reading it changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from stores import CampaignStore, DamagedBlockError
from stores.blocks.blocks import Blocks
from stores.format.groups import Location
from stores.opening import open_any
from stores.records import RUNNING, Failure, Lease, Process, WorkerRecord
from stores.work.worklog import WorkLog

ALIVE, SILENT, LOST = "alive", "silent", "lost"  # beside what a worker says of itself at its end: ended, stopped
CAMPAIGN, ATTRIBUTIONS = "campaign", "attributions"

_ADVICE = {
    "NonFiniteOutputError": "Check that example's input and the model for overflow, or ablate a smaller fraction.",
    "OutOfMemoryError": "Give the run a smaller batch_size or memory_budget, or a device with more memory.",
    "MemoryError": "Give the run a smaller batch_size or block, or a machine with more memory.",
}
_TRY_AGAIN = "Remove the cause and run the same command again: it tries the block anew."


@dataclass(frozen=True)
class WorkerStatus:
    """One worker that is or was at a store.

    Attributes:
      id, host, pid, device: Who and where; device None where it was not told.
      state: "alive"; "silent": its last sign of life is older than its lease time, if the two clocks agree; "lost": its
        process is known to be dead, or it gave no sign for its lease time while it was watched; "ended"; "stopped": it
        ended with an error, or was interrupted.
      at: The block it is at, None if it is at none.
      blocks, rows: Finished by it, as it last told.
      rows_per_second: While computing; None before its first block.
      seen: When it last told, by its own clock.
      seen_seconds_ago: The same by this machine's clock; good for people only.
    """

    id: str
    host: str
    pid: int
    device: str | None
    state: str
    at: int | None
    blocks: int
    rows: int
    rows_per_second: float | None
    seen: str
    seen_seconds_ago: float | None


@dataclass(frozen=True)
class FailedBlock:
    """A block that failed and is not finished since: why, and what to do.

    Attributes:
      block, first, last: Its number, and its first and last row.
      attempts: How often it failed.
      set_aside: Whether it is not tried any more until the next run.
      why, worker, time: Of the last failure.
      advice: What to do about it.
    """

    block: int
    first: int
    last: int
    attempts: int
    set_aside: bool
    why: str
    worker: str
    time: str
    advice: str


@dataclass(frozen=True)
class Status:
    """How far a store is.

    Attributes:
      store: Where it is.
      kind: "campaign" or "attributions".
      unit: What its rows are: "row" or "example".
      complete: Every block is finished, and none is seen to be damaged.
      finished_rows, rows, finished_blocks, blocks: Done and in total.
      running_blocks: Unfinished ones that a worker is at which is not known to be lost.
      failed_blocks: Unfinished ones that failed and will be tried again.
      set_aside_blocks: Unfinished ones that failed too often.
      left_blocks: Neither finished nor set aside.
      examples, components: Of the store.
      rows_per_second: Of all workers that are alive; None if none is, or none has finished a block yet.
      eta_seconds: Until nothing is left, at that rate; None if it is unknown.
      worker_hours_left: What is left to compute, at the mean rate of one worker of this store; None if unknown.
      bytes: What the store takes, None where that cannot be told.
      workers: All that ever worked on it, oldest first.
      failures: Unfinished blocks that failed.
      damaged: What is wrong with finished blocks, as marks and files tell; `coar verify` reads the data, too.
      spec, versions: What it was made from, and by which packages.
    """

    store: str
    kind: str
    unit: str
    complete: bool
    finished_rows: int
    rows: int
    finished_blocks: int
    blocks: int
    running_blocks: int
    failed_blocks: int
    set_aside_blocks: int
    left_blocks: int
    examples: int
    components: int
    rows_per_second: float | None
    eta_seconds: float | None
    worker_hours_left: float | None
    bytes: int | None
    workers: tuple[WorkerStatus, ...]
    failures: tuple[FailedBlock, ...]
    damaged: tuple[str, ...]
    spec: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to compute: all blocks are finished or set aside."""
        return self.left_blocks == 0

    def count(self, *states: str) -> int:
        """Returns how many workers are in one of these states."""
        return sum(worker.state in states for worker in self.workers)

    def describe(self) -> dict[str, Any]:
        """Returns everything as JSON-able values."""
        return asdict(self)


def status(location: Location) -> Status:
    """Returns how far a campaign or an estimate is, also while workers write to it. Mutates nothing.

    Args:
      location: A path, URL or zarr store object.

    Cost: one look at every mark and every file of a finished block; no data is read.

    Raises:
      stores.StoreNotFoundError, stores.StoreUnreadableError: Nothing, or something else, is there.
    """
    return Watch(location).look()


class Watch:
    """Looks at one store again and again, and so tells lost workers from live ones, whatever their clocks say.

    Args:
      location: A path, URL or zarr store object.
      clock: Seconds, for tests.
    """

    def __init__(self, location: Location, clock: Callable[[], float] = time.monotonic) -> None:
        self._location, self._clock = location, clock
        self._here = Process.current().machine
        self._beats: dict[str, tuple[int, float, bool]] = {}  # beat, since when, whether it ever moved
        self._lost_files: list[str] | None = None
        self._bytes: tuple[int, int | None] = (-1, None)  # finished blocks, bytes then

    def look(self) -> Status:
        """Returns how far the store is now."""
        store = open_any(self._location)
        blocks = store.blocks
        log = WorkLog(blocks.store)
        # The marks are read last: else a block that is finished meanwhile would seem to be left, with nobody at it.
        records = log.workers()
        leases = [lease for lease in log.leases().values() if 0 <= lease.block < len(blocks)]
        failures = [failure for failure in log.failures().values() if failure.block < len(blocks) and failure.attempts]
        finished, damaged = _finished(blocks)
        if not damaged:
            damaged = self._lost(blocks, bool(finished.all()))
        at = {lease.worker: lease.block for lease in leases if not finished[lease.block]}
        workers = tuple(self._worker(record, at.get(record.id)) for record in records)
        unfinished = sorted((f for f in failures if not finished[f.block]), key=lambda f: f.block)
        set_aside = [failure.block for failure in unfinished if failure.set_aside]
        sizes = _sizes(blocks)
        left = ~finished
        left[set_aside] = False
        campaign = isinstance(store, CampaignStore)
        identity = store.header.get("identity", {})
        return Status(
            store=store.where,
            kind=CAMPAIGN if campaign else ATTRIBUTIONS,
            unit="row" if campaign else "example",
            complete=bool(finished.all()) and not damaged,
            finished_rows=int(sizes[finished].sum()),
            rows=blocks.rows,
            finished_blocks=int(finished.sum()),
            blocks=len(blocks),
            running_blocks=_running(leases, workers, left),
            failed_blocks=len(unfinished) - len(set_aside),
            set_aside_blocks=len(set_aside),
            left_blocks=int(left.sum()),
            examples=store.example_count,
            components=store.component_count,
            **_outlook(int(sizes[left].sum()), workers, records),
            bytes=self._size(blocks, int(finished.sum())),
            workers=workers,
            failures=tuple(_failed(blocks, failure) for failure in unfinished),
            damaged=tuple(damaged),
            spec=store.header.get("spec", {}),
            versions=identity.get("versions", {}),
        )

    def _worker(self, record: WorkerRecord, at: int | None) -> WorkerStatus:
        ago = _seconds_since(record.seen)
        state = record.state
        if state == RUNNING:
            state = self._state(record, ago)
        return WorkerStatus(
            id=record.id,
            host=record.process.host,
            pid=record.process.pid,
            device=record.facts.get("device"),
            state=state,
            at=at,
            blocks=record.blocks,
            rows=record.rows,
            rows_per_second=record.rows / record.seconds if record.rows and record.seconds else None,
            seen=record.seen,
            seen_seconds_ago=ago,
        )

    def _state(self, record: WorkerRecord, ago: float | None) -> str:
        """Returns whether a worker that says it runs does so, as far as can be told."""
        now = self._clock()
        beat, since, moved = self._beats.get(record.id, (record.beat, now, False))
        if beat != record.beat:
            since, moved = now, True
        self._beats[record.id] = (record.beat, since, moved)
        if record.process.is_known_dead() or now - since > record.lease_seconds:
            return LOST
        if moved or (self._here and record.process.machine == self._here):
            return ALIVE
        return SILENT if ago is None or ago > record.lease_seconds else ALIVE

    def _lost(self, blocks: Blocks, complete: bool) -> list[str]:
        """Returns what is said about files that are gone; looked for the first time, and at the end."""
        if self._lost_files is None or complete:
            try:
                blocks.check_present()
                self._lost_files = []
            except DamagedBlockError as error:
                self._lost_files = [str(error)]
        return self._lost_files

    def _size(self, blocks: Blocks, finished: int) -> int | None:
        if self._bytes[0] != finished:
            self._bytes = (finished, _stored_bytes(blocks.store))
        return self._bytes[1]


def _finished(blocks: Blocks) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Returns which blocks are finished, and what is wrong with marks that cannot be read: those are not finished."""
    try:
        return blocks.finished().copy(), []
    except DamagedBlockError:
        finished, damaged = np.zeros(len(blocks), dtype=np.bool_), []
        for block in range(len(blocks)):
            try:
                finished[block] = blocks.is_finished(block)
            except DamagedBlockError as error:
                damaged.append(str(error))
        return finished, damaged


def _sizes(blocks: Blocks) -> npt.NDArray[np.int64]:
    spans = [blocks.span(block) for block in range(len(blocks))]
    return np.array([span.stop - span.start for span in spans], dtype=np.int64)


def _running(leases: list[Lease], workers: tuple[WorkerStatus, ...], left: npt.NDArray[np.bool_]) -> int:
    working = {worker.id for worker in workers if worker.state in (ALIVE, SILENT)}
    return sum(bool(left[lease.block]) and lease.worker in working for lease in leases)


def _outlook(rows: int, workers: tuple[WorkerStatus, ...], records: list[WorkerRecord]) -> dict[str, float | None]:
    """Returns rate, time and cost of the rows that are left."""
    rates = [worker.rows_per_second for worker in workers if worker.state == ALIVE and worker.rows_per_second]
    rate = sum(rates) if rates else None
    seconds = sum(record.seconds for record in records)
    each = sum(record.rows for record in records) / seconds if seconds else 0.0
    return {
        "rows_per_second": rate,
        "eta_seconds": 0.0 if rows == 0 else rows / rate if rate else None,
        "worker_hours_left": 0.0 if rows == 0 else rows / each / 3600 if each else None,
    }


def _failed(blocks: Blocks, failure: Failure) -> FailedBlock:
    span, last = blocks.span(failure.block), failure.attempts[-1]
    advice = " ".join(text for text in (_ADVICE.get(last.kind), _TRY_AGAIN) if text)
    if not failure.set_aside:
        advice = "It is tried again by itself while workers run; else by the next run of the same command."
    return FailedBlock(
        block=failure.block,
        first=span.start,
        last=span.stop - 1,
        attempts=len(failure.attempts),
        set_aside=failure.set_aside,
        why=last.why,
        worker=last.worker,
        time=last.time,
        advice=advice,
    )


def _seconds_since(then: str) -> float | None:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(then)).total_seconds()
    except (ValueError, TypeError):  # what was written is no time
        return None


def _stored_bytes(store: Store) -> int | None:
    """Returns what all objects of a store take, None if they change too fast to be counted."""
    if isinstance(store, LocalStore):
        return sum(_file_size(Path(folder) / name) for folder, _, names in os.walk(store.root) for name in names)
    try:
        return int(sync(store.getsize_prefix("")))
    except FileNotFoundError:
        return None


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a lease that was given back, or a draft that got its name
        return 0
