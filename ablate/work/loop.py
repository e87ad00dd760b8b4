"""The one loop of everything that is computed block by block: claim, compute, write, go on; alone or with others."""

from __future__ import annotations

import logging
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy.typing as npt
import torch

from ablate.engine.engine import Engine
from ablate.engine.ticks import listening
from ablate.errors import NonFiniteOutputError, SpecError
from ablate.work.progress import BlockProgress
from stores import FailedBlocksError
from stores.blocks.blocks import Blocks
from stores.records import LEASE_SECONDS, LONGEST_LEASE, MOST_FAILURES, Attempt, Failure, utc_now
from stores.work.queue import BlockQueue
from stores.work.worker import Worker
from stores.work.worklog import WorkLog

LOG = logging.getLogger("ablate.work")
HOPELESS = 3  # blocks that fail before any has worked: then it is not the block
Values = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Sharing:
    """How a process works on a store that others may work on, too.

    Args:
      worker: (i, n): worker i of n, i from 0; says at which block it begins, nothing else.
      lease_seconds: After how long without a sign of life a worker's block is another's.
      keep_going: Set a block aside that failed `most_failures` times, and go on with the others.
      retry_failed: Try blocks anew that were set aside before.
    """

    worker: tuple[int, int] = (0, 1)
    lease_seconds: float = LEASE_SECONDS
    keep_going: bool = False
    retry_failed: bool = True
    most_failures: int = MOST_FAILURES

    @classmethod
    def of(
        cls,
        worker: str | None,
        lease_seconds: float = LEASE_SECONDS,
        keep_going: bool = False,
        retry: bool | None = None,
    ) -> Sharing:
        """Returns it with a worker as the command line names it, "i/N" with i from 0; None is "0/1".

        `retry` None: worker 0 alone tries anew what was set aside, else the later ones would forget what the earlier
        have just found out.
        """
        if not 0 < lease_seconds <= LONGEST_LEASE:
            most = f"more than 0 and at most {LONGEST_LEASE:,.0f}"
            raise SpecError("Workers", [f"lease_seconds: got {lease_seconds}, expected {most}."])
        number = parse_worker(worker)
        return cls(number, float(lease_seconds), keep_going, number[0] == 0 if retry is None else retry)


class Store(Protocol):
    """What the loop needs of a campaign store or an attribution store."""

    blocks: Blocks
    where: str


@dataclass(frozen=True)
class Job:
    """What is computed, block by block.

    Args:
      name: What the progress says.
      unit: What the rows of the store are: "row" or "example".
      compute: Returns the arrays of a block.
      write: Writes them; returns False if another worker was first.
      span: How a block is named in messages, e.g. "keep rows 7 to 13".
      work: About how many forwards a row of the store takes, for the progress within a block; None: not known before.
      measured: Returns what a block's arrays say of its own quality, for the log: names and numbers.
    """

    name: str
    unit: str
    compute: Callable[[int], Values]
    write: Callable[[int, Values], bool]
    span: Callable[[int], str]
    work: float | None = None
    measured: Callable[[Values], Mapping[str, float]] = lambda values: {}


def parse_worker(worker: str | None) -> tuple[int, int]:
    """Returns (i, n) of "i/n", i from 0 to n - 1."""
    if worker is None:
        return 0, 1
    first, slash, second = worker.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
        return int(first), int(second)
    raise SpecError("Workers", [f"worker: got {worker!r}, expected i/N with i from 0 to N - 1, for example 0/4."])


def environment(engine: Engine, versions: Mapping[str, str]) -> dict[str, Any]:
    """Returns what changes rounding only, and is recorded, not compared."""
    return {
        "versions": dict(versions),
        "python": platform.python_version(),
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "batch_size": engine.batch_size,
        "speed": asdict(engine.speed),
    }


def work_through(store: Store, job: Job, facts: Mapping[str, Any], sharing: Sharing, progress: bool) -> None:
    """Computes the blocks of a store that nobody has finished, until all are finished or set aside.

    Any number of processes may do this at once, on one machine or many, with nothing in common but the store.

    Args:
      store: Open for writing.
      job: What is computed.
      facts: What this worker runs on, for its record in the store.
      sharing: How it works beside others.
      progress: Show rows per second and time left on stderr.

    Raises:
      FailedBlocksError: Blocks were set aside; all others are finished.
      Exception: What a block raised, unless `sharing.keep_going`; or all blocks fail; or storage does.
    """
    log = WorkLog(store.blocks.store)
    if sharing.retry_failed:
        log.clear_failures()
    with Worker(store.blocks.store, facts, sharing.lease_seconds) as worker:
        worker.on_trouble = lambda error: LOG.warning(
            "The heart-beat could not be written: %s", error, extra={"event": "heart_beat_failed"}
        )
        began = {"event": "worker_began", "worker": worker.id, "store": store.where}
        LOG.info("worker %s begins", worker.id, extra=began)
        _Loop(store, job, worker, log, sharing).run(progress)
        LOG.info(
            "worker %s ends after %d blocks", worker.id, worker.record.blocks,
            extra={"event": "worker_ended", "worker": worker.id, "blocks": worker.record.blocks},
        )  # fmt: skip
    failures = [failure for failure in log.failures().values() if failure.set_aside]
    if failures:
        advice = "Remove the cause and run the same command again: it tries them anew."
        raise FailedBlocksError(store.where, sorted(failures, key=lambda f: f.block), store.blocks.count, advice)


class _Loop:
    def __init__(self, store: Store, job: Job, worker: Worker, log: WorkLog, sharing: Sharing) -> None:
        self.store, self.job, self.worker, self.log, self.sharing = store, job, worker, log, sharing
        self.failed: set[int] = set()  # blocks that this worker saw fail
        self.first_error: Exception | None = None
        self.queue = BlockQueue(store.blocks, worker, sharing.worker, self._aside)

    def _aside(self) -> set[int]:
        if not self.sharing.keep_going:
            return set()
        return {block for block, failure in self.log.failures().items() if failure.set_aside}

    def run(self, progress: bool) -> None:
        blocks, job = self.store.blocks, self.job
        with BlockProgress(job.name, job.unit, blocks, progress, job.work, self._failures) as bar:
            for block in iter(self.queue.next, None):
                try:
                    with listening(bar.begin(block)):
                        self._one(block)
                finally:
                    self.worker.release(block)
                bar.settle(block, block in self.queue.finished)
            bar.look()

    def _failures(self) -> int:
        return len(set(self.log.failures()) - self.queue.finished)

    def _rows(self) -> int:
        spans = [self.store.blocks.span(block) for block in self.queue.finished]
        return sum(span.stop - span.start for span in spans)

    def _one(self, block: int) -> None:
        """Computes and writes one block that this worker has claimed."""
        start = time.perf_counter()
        try:
            values = self.job.compute(block)
        except Exception as error:
            error.add_note(
                f"This happened in block {block} ({self.job.span(block)}) of {self.store.where}. "
                "Finished blocks stay: run the same command again to go on from here."
            )
            self._failed(block, error)
            return
        written = self.job.write(block, values)  # what storage raises is no fault of the block: it ends the run
        seconds = time.perf_counter() - start
        self.queue.finished.add(block)
        self.log.forget_failure(block)  # of an earlier try, perhaps another worker's
        span = self.store.blocks.span(block)
        rows, size = span.stop - span.start, sum(value.nbytes for value in values.values())
        if written:
            self.worker.finished(rows, size, seconds)
        LOG.info(
            "block %d finished: %d %ss in %.2f s", block, rows, self.job.unit, seconds,
            extra={"event": "block_finished" if written else "block_was_finished", "block": block, "rows": rows,
                   "seconds": round(seconds, 3), "worker": self.worker.id, "finished_rows": self._rows(),
                   "finished_blocks": len(self.queue.finished), "blocks": len(self.store.blocks),
                   **self._quality(values)},
        )  # fmt: skip

    def _quality(self, values: Values) -> dict[str, Any]:
        measured = self.job.measured(values)
        return {"measured": dict(measured)} if measured else {}

    def _failed(self, block: int, error: Exception) -> None:
        """Records that a block failed; raises the error again unless the others are to go on."""
        self.failed.add(block)
        kind = type(error).__name__
        attempt = Attempt(f"{kind}: {error}", kind, self.worker.id, utc_now())
        before = self.log.failure(block)
        tries = 1 + (len(before.attempts) if before else 0)
        # a number that is not finite comes out the same every time
        set_aside = self.sharing.keep_going and (
            tries >= self.sharing.most_failures or isinstance(error, NonFiniteOutputError)
        )
        failure = self.log.add_failure(block, attempt, set_aside)
        self._tell(block, failure, error)
        nothing_works = set_aside and not self.queue.finished and len(self.failed) >= HOPELESS
        self.first_error = self.first_error or error
        if not self.sharing.keep_going or nothing_works:
            raise self.first_error

    def _tell(self, block: int, failure: Failure, error: Exception) -> None:
        what = "set aside" if failure.set_aside else "to be tried again"
        LOG.error(
            "block %d (%s) failed, %s: %s", block, self.job.span(block), what, failure.attempts[-1].why,
            extra={"event": "block_set_aside" if failure.set_aside else "block_failed", "block": block,
                   "attempt": len(failure.attempts), "why": failure.attempts[-1].why, "worker": self.worker.id,
                   "trace": "".join(traceback.format_exception(error))},
        )  # fmt: skip
