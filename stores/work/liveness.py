"""Telling whether workers are at a store: by their process where it is on this machine, else by their heart-beat."""

from __future__ import annotations

import time

from stores.errors import StoreError
from stores.records import RUNNING, Process, WorkerRecord
from stores.work.worklog import WorkLog

LONGEST_WATCH = 600.0  # seconds; a record may say anything
POLL_SECONDS = 1.0


class StoreBusyError(StoreError):
    """Workers are at a store that nobody may be at."""


def live_workers(log: WorkLog) -> list[WorkerRecord]:
    """Returns the workers that are at a store now. Mutates nothing.

    A process of this machine is alive or not. Of another machine's there is only its heart-beat: where it is needed, it
    is watched for as long as a lease holds, a minute by default. Clocks are not compared.
    """
    here = Process.current().machine
    running = [r for r in log.workers() if r.state == RUNNING and not r.process.is_known_dead()]
    alive = [record for record in running if here and record.process.machine == here]
    return alive or _beating(log, running)


def _beating(log: WorkLog, records: list[WorkerRecord]) -> list[WorkerRecord]:
    """Returns those whose heart beats while they are watched; looks no longer once one does."""
    start = time.monotonic()
    longest = max((min(float(record.lease_seconds), LONGEST_WATCH) for record in records), default=0.0)
    while time.monotonic() - start < longest:
        now = {record.id: record for record in log.workers()}
        beating = [r for r in records if r.id in now and now[r.id].beat != r.beat and now[r.id].state == RUNNING]
        if beating:
            return beating
        time.sleep(min(POLL_SECONDS, longest / 10))
    return []
