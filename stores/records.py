"""Records of the work on a store: processes, workers, leases, failures. Plain values; WorkLog reads and writes them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RUNNING, ENDED, STOPPED = "running", "ended", "stopped"
LEASE_SECONDS = 60.0
MOST_FAILURES = 3
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


def utc_now() -> str:
    """Returns the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
