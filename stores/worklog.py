"""Book-keeping of the work on a store: who works on it, on which block, and which blocks failed. Never data.

Everything lies as small JSON objects under `work/` beside the arrays. Nothing here decides whether a block is finished:
leases and records only save work. Losing them, or a worker that wakes up after its lease, changes no stored number.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zarr.abc.store import Store

from stores import objects

WORKERS, LEASES, FAILURES = "work/workers", "work/leases", "work/failures"
RUNNING, ENDED, STOPPED = "running", "ended", "stopped"
LEASE_SECONDS = 60.0
MOST_FAILURES = 3

_here: set[str] = set()  # the workers that are entered in this process
LONGEST_LEASE = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Process:
    """Which process on which machine: enough to tell, on the same machine, whether it still lives."""

    host: str
    pid: int
    machine: str  # one start of one machine, and one container on it
    born: str  # when the process was started, in the machine's own count: process ids are used again

    @classmethod
    def current(cls) -> Process:
        """Returns this process."""
        return cls(socket.gethostname(), os.getpid(), _machine(), _born(os.getpid()) or "")

    def is_known_dead(self) -> bool:
        """Returns whether the process was on this machine and is no more; False if that cannot be told from here."""
        if not self.machine or self.machine != _machine():
            return False
        born = _born(self.pid)
        return born is None or (self.born != "" and born != self.born)


def _machine() -> str:
    """Returns what this start of this machine and container have alone; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """Returns when a process was started, in ticks since the machine's start; None if there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]


@dataclass
class WorkerRecord:
    """What one worker tells about itself, and when it told it last. Times are its own clock's, for people only."""

    id: str
    process: Process
    began: str
    seen: str
    facts: dict[str, Any] = field(default_factory=dict)  # device, versions, threads, ...
    state: str = RUNNING
    beat: int = 0  # grows while the worker lives
    blocks: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0  # spent on blocks
    lease_seconds: float = LEASE_SECONDS
    at: int = -1  # the block that it was at last, also when another has taken that over since

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WorkerRecord | None:
        """Returns a record that was read, or None if it is none."""
        try:
            process = Process(**value["process"])
            record = cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value} | {"process": process})
        except (KeyError, TypeError):
            return None
        return record if record._is_one() else None

    def _is_one(self) -> bool:
        """Returns whether all values are of their types, and the lease ends some day: anybody may have written them."""
        process = self.process
        texts = (self.id, self.began, self.seen, self.state, process.host, process.machine, process.born)
        counts = (process.pid, self.beat, self.blocks, self.rows, self.bytes, self.at)
        named = all(isinstance(text, str) for text in texts) and all(type(count) is int for count in counts)
        timed = all(type(seconds) in (int, float) for seconds in (self.seconds, self.lease_seconds))
        return named and timed and isinstance(self.facts, dict) and 0 < self.lease_seconds <= LONGEST_LEASE


@dataclass(frozen=True)
class Lease:
    """Says that a worker is at a block, so that others take another one."""

    block: int
    worker: str
    since: str


@dataclass(frozen=True)
class Attempt:
    """One try of a block that failed."""

    why: str
    kind: str
    worker: str
    time: str


@dataclass(frozen=True)
class Failure:
    """A block that failed, every try of it, and whether it was set aside."""

    block: int
    attempts: tuple[Attempt, ...]
    set_aside: bool


class WorkLog:
    """The book-keeping in one store, to read; writing is left to the workers."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def worker(self, name: str) -> WorkerRecord | None:
        """Returns the record of a worker, or None."""
        value = objects.read_json(self.store, f"{WORKERS}/{name}.json")
        return None if value is None else WorkerRecord.from_json(value)

    def workers(self) -> list[WorkerRecord]:
        """Returns the records of all workers that ever worked on the store, oldest first."""
        found = [self.worker(name.removesuffix(".json")) for name in objects.names(self.store, WORKERS)]
        return sorted((record for record in found if record is not None), key=lambda record: (record.began, record.id))

    def leases(self) -> dict[int, Lease]:
        """Returns which worker says to be at which block, stale or not."""
        found = {}
        for name in objects.names(self.store, LEASES):
            value = objects.read_json(self.store, f"{LEASES}/{name}")
            if value is not None and type(value.get("block")) is int and {"worker", "since"} <= set(value):
                found[value["block"]] = Lease(value["block"], str(value["worker"]), str(value["since"]))
        return found

    def failures(self) -> dict[int, Failure]:
        """Returns every block that failed and is not known to be finished since."""
        found = {}
        for name in objects.names(self.store, FAILURES):
            number = name.removesuffix(".json")
            failure = self.failure(int(number)) if number.isdecimal() else None
            if failure is not None:
                found[failure.block] = failure
        return found

    def failure(self, block: int) -> Failure | None:
        """Returns what is known of a block's failures, or None."""
        value = objects.read_json(self.store, f"{FAILURES}/{block}.json")
        try:
            if value is None:
                return None
            attempts = tuple(Attempt(**attempt) for attempt in value["attempts"])
            return Failure(block, attempts, bool(value["set_aside"])) if attempts else None
        except (KeyError, TypeError, AttributeError):
            return None

    def add_failure(self, block: int, attempt: Attempt, set_aside: bool) -> Failure:
        """Adds a failed try of a block. For the worker that holds the block's lease."""
        before = self.failure(block)
        failure = Failure(block, (*(before.attempts if before else ()), attempt), set_aside)
        objects.replace(self.store, f"{FAILURES}/{block}.json", objects.to_json(asdict(failure)))
        return failure

    def forget_failure(self, block: int) -> None:
        """Removes what is known of a block's failures: it is finished, or to be tried anew."""
        objects.delete(self.store, f"{FAILURES}/{block}.json")

    def clear_failures(self) -> None:
        """Forgets all failures, so that blocks that were set aside are tried anew."""
        for block in self.failures():
            self.forget_failure(block)


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


def environments(header: Mapping[str, Any], store: Store) -> list[dict[str, Any]]:
    """Returns what the workers on a store ran on, without repetitions, oldest first; format 1 kept it in the header."""
    found = [dict(environment) for environment in header.get("environments", [])]
    for record in WorkLog(store).workers():
        if record.facts and record.facts not in found:
            found.append(record.facts)
    return found


def utc_now() -> str:
    """Returns the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
