"""One worker at a store: its record, its heart-beat and its leases."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from zarr.abc.store import Store

from stores.records import (
    ENDED,
    LEASE_SECONDS,
    RUNNING,
    STOPPED,
    Lease,
    Process,
    WorkerRecord,
    utc_now,
)
from stores.storage import objects
from stores.work.worklog import LEASES, WORKERS, WorkLog

_here: set[str] = set()  # the workers that are entered in this process


class Worker:
    """Makes this process a worker on a store: its record, its heart-beat and its leases. A context manager.

    While it is entered, a thread rewrites its record every quarter of `lease_seconds`. A lease is stale if its worker
    has ended, is known to be dead, or its record has not changed for its lease time, measured by the observer's own
    clock from when it first looked: clocks of two machines are never compared, and a clock set back changes nothing.
    """

    def __init__(self, store: Store, facts: Mapping[str, Any], lease_seconds: float = LEASE_SECONDS) -> None:
        process, now = Process.current(), utc_now()
        name = f"{process.host}-{process.pid}-{uuid.uuid4().hex[:6]}"
        self.log = WorkLog(store)
        self.record = WorkerRecord(name, process, now, now, dict(facts), lease_seconds=lease_seconds)
        self._seen: dict[str, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._written = -1.0
        self._thread: threading.Thread | None = None
        self.on_trouble: Callable[[Exception], None] = lambda error: None

    @property
    def id(self) -> str:
        """The worker's name."""
        return self.record.id

    def __enter__(self) -> Worker:
        _here.add(self.id)
        self._write()
        self._thread = threading.Thread(target=self._keep_beating, name="heart-beat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        _here.discard(self.id)
        if self._thread is not None:
            self._thread.join()
        self.record.state = ENDED if kind is None else STOPPED
        self._try_to_write()

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.record.lease_seconds / 4):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except Exception as error:
            self.on_trouble(error)

    def _write(self) -> None:
        with self._writing:
            self.record.beat += 1
            self.record.seen = utc_now()
            objects.replace(self.log.store, f"{WORKERS}/{self.id}.json", objects.to_json(asdict(self.record)))
            self._written = time.monotonic()

    def finished(self, rows: int, size: int, seconds: float) -> None:
        """Counts a block that this worker finished; tells it at once, but at most once a second."""
        self.record.blocks += 1
        self.record.rows += rows
        self.record.bytes += size
        self.record.seconds += seconds
        if time.monotonic() - self._written > 1:
            self._try_to_write()

    def claim(self, block: int) -> bool:
        """Returns whether the block is this worker's to compute: nobody else is at it, or nobody alive."""
        key = f"{LEASES}/{block}.json"
        mine = objects.to_json(asdict(Lease(block, self.id, utc_now())))
        objects.create(self.log.store, key, mine)
        holder = self._holder(key)
        if holder != self.id and self._is_stale(holder):
            objects.delete(self.log.store, key)
            objects.create(self.log.store, key, mine)  # two may see it stale at once: one wins, or both work in vain
            holder = self._holder(key)
        if holder == self.id:
            self.record.at = block
            self._try_to_write()  # before the work: if it kills this worker, it is known at what
        return holder == self.id

    def release(self, block: int) -> None:
        """Gives a lease back, if it is still this worker's."""
        key = f"{LEASES}/{block}.json"
        if self._holder(key) == self.id:
            objects.delete(self.log.store, key)

    def _holder(self, key: str) -> str | None:
        value = objects.read_json(self.log.store, key)
        return None if value is None else str(value.get("worker"))

    def _is_stale(self, holder: str | None) -> bool:
        if holder is None:
            return True
        record = self.log.worker(holder)
        if record is None or record.state != RUNNING or record.process.is_known_dead():
            return True
        if record.process == self.record.process and holder not in _here:  # of an earlier run in this process
            return True
        beat, since = self._seen.get(holder, (-1, 0.0))
        now = time.monotonic()
        if beat != record.beat:
            self._seen[holder] = (record.beat, now)
            return False
        return now - since > record.lease_seconds
