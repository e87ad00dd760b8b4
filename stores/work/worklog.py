"""Book-keeping of the work on a store: who works on it, on which block, and which blocks failed. Never data.

Everything lies as small JSON objects under `work/` beside the arrays. Nothing here decides whether a block is finished:
leases and records only save work. Losing them, or a worker that wakes up after its lease, changes no stored number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from zarr.abc.store import Store

from stores.records import (
    Attempt,
    Failure,
    Lease,
    WorkerRecord,
)
from stores.storage import objects

WORKERS, LEASES, FAILURES = "work/workers", "work/leases", "work/failures"


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


def environments(header: Mapping[str, Any], store: Store) -> list[dict[str, Any]]:
    """Returns what the workers on a store ran on, without repetitions, oldest first; format 1 kept it in the header."""
    found = [dict(environment) for environment in header.get("environments", [])]
    for record in WorkLog(store).workers():
        if record.facts and record.facts not in found:
            found.append(record.facts)
    return found
