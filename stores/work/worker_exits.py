"""What the death of a worker leaves, told by whoever started it: a failed try of its block, a record that says so."""

from __future__ import annotations

from dataclasses import asdict

from stores.blocks.blocks import Blocks
from stores.records import MOST_FAILURES, RUNNING, STOPPED, Attempt, Failure, WorkerRecord, utc_now
from stores.storage import objects
from stores.work.worklog import WORKERS, WorkLog

KIND = "WorkerDied"


def record_worker_death(
    blocks: Blocks, host: str, pid: int, why: str, most_failures: int = MOST_FAILURES
) -> list[Failure]:
    """Notes that a process died at its work: a failed try of the block it was at. Returns the block's failures.

    A block that kills its worker every time must not be tried for ever: it is set aside like one that raises. Its
    lease is stale from now on, on every machine. Returns nothing if the process was at no block, or had finished it.
    """
    log = WorkLog(blocks.store)
    dead = _records(log, host, pid)
    failures = []
    for record in sorted(dead, key=lambda record: record.at):
        if 0 <= record.at < blocks.count and not blocks.is_finished(record.at):
            before = log.failure(record.at)
            tries = 1 + (len(before.attempts) if before else 0)
            attempt = Attempt(why, KIND, record.id, utc_now())
            failures.append(log.add_failure(record.at, attempt, set_aside=tries >= most_failures))
    _say_stopped(blocks, dead)
    return failures


def record_stop(blocks: Blocks, host: str, pid: int) -> None:
    """Notes that a process was ended on purpose: its lease is stale from now on, and no block has failed."""
    _say_stopped(blocks, _records(WorkLog(blocks.store), host, pid))


def forget_finished(blocks: Blocks) -> dict[int, Failure]:
    """Forgets the failures of blocks that are finished by now, and returns those of all others."""
    log = WorkLog(blocks.store)
    failures = log.failures()
    for block in [block for block in failures if block < blocks.count and blocks.is_finished(block)]:
        log.forget_failure(block)
        del failures[block]
    return failures


def _records(log: WorkLog, host: str, pid: int) -> list[WorkerRecord]:
    return [r for r in log.workers() if r.state == RUNNING and (r.process.host, r.process.pid) == (host, pid)]


def _say_stopped(blocks: Blocks, records: list[WorkerRecord]) -> None:
    for record in records:
        record.state = STOPPED
        objects.replace(blocks.store, f"{WORKERS}/{record.id}.json", objects.to_json(asdict(record)))
