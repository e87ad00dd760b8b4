"""Looking after workers that were started here, wherever they run: progress, restarts, and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ablate.errors import BAD_INPUT, FAILED, MISMATCH, NOT_FINISHED, AblateError
from ablate.work.progress import progress_bar
from stores import FailedBlocksError, StoreError
from stores.blocks.blocks import Blocks
from stores.work.worker_exits import forget_finished, record_stop, record_worker_death
from stores.work.worklog import WorkLog

LOG = logging.getLogger("ablate.work")
POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between two looks at the store
LOOK_SHARE = 0.05  # of the time, at most, goes into looking at the store
STOP_SECONDS = 15.0  # what workers get to end in order before they are killed
MOST_EARLY_DEATHS = 3  # of one worker in a row, before it was at any block: it cannot start
MOST_DEATHS = 9  # of all in a row, without a block finished: it is not the block


class WorkersError(AblateError):
    """Workers ended before all blocks were finished; `code` is the exit code that says why."""

    def __init__(self, message: str, code: int) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True)
class End:
    """How a worker ended: with an exit code and what it said, or it died, and how."""

    code: int = 0
    said: str = ""
    died: str = ""


class WorkerHandle(Protocol):
    """One worker that was started here: a process, or an actor on a cluster."""

    name: str

    def start(self) -> None:
        """Starts it, or starts it again after it died."""

    def poll(self) -> End | None:
        """Returns how it ended, None while it works."""

    def process(self) -> tuple[str, int] | None:
        """Returns host and id of the process that works, if they are known."""

    def stop(self) -> None:
        """Asks it to end; returns at once."""

    def kill(self) -> None:
        """Ends it, whatever it does, and gives back what it holds here."""


@dataclass(frozen=True)
class View:
    """What is seen of the store that workers fill.

    Args:
      where: The store, as users know it.
      name: What the progress says.
      unit: What the rows of the store are: "row" or "example".
      open: Returns its blocks, open for writing; None while there is no such store.
    """

    where: str
    name: str
    unit: str
    open: Callable[[], Blocks | None]


def supervise(handles: Sequence[WorkerHandle], view: View, *, progress: bool = True) -> None:
    """Starts workers, starts those again that die, and returns when every block is finished.

    Whatever ends it, an interrupt too, no worker is left running.

    Args:
      handles: The workers, not started.
      view: The store they fill.
      progress: Show rows per second and time left on stderr.

    Raises:
      stores.FailedBlocksError: Blocks were set aside; all others are finished.
      WorkersError: All workers have ended, and blocks are left.
    """
    _Supervisor(handles, view, progress).run()


@dataclass
class _State:
    """What is known of one worker."""

    handle: WorkerHandle
    early_deaths: int = 0
    ends: list[str] = field(default_factory=list)  # what it said or how it died, where that was the end of it
    code: int = 0


class _Supervisor:
    def __init__(self, handles: Sequence[WorkerHandle], view: View, progress: bool) -> None:
        self.states = [_State(handle) for handle in handles]
        self.view, self.progress = view, progress
        self.blocks: Blocks | None = None
        self.finished = -1  # blocks, when last looked at
        self.deaths = 0  # since a block was finished
        self.attempts: dict[int, int] = {}  # how often each block has failed, when last looked at
        self.next_look = 0.0
        self.bar: Any = None

    def run(self) -> None:
        working: list[_State] = []
        try:
            for state in self.states:
                working.append(state)
                state.handle.start()
            while working:
                working = [state for state in working if self._goes_on(state)]
                self._look()
                if working:
                    time.sleep(POLL_SECONDS)
            self._look(now=True)
        finally:
            if self.bar is not None:
                self.bar.close()
            self._open()  # it may be younger than the last look
            _end(working, self.blocks)
        self._settle()

    def _goes_on(self, state: _State) -> bool:
        """Returns whether a worker is at work, or is again after it died."""
        end = state.handle.poll()
        if end is None:
            return True
        if end.died:
            return self._goes_on_after_death(state, end)
        state.handle.kill()
        state.code = end.code
        if end.code not in (0, NOT_FINISHED):  # what was set aside, the store tells
            state.ends.append(end.said or f"ended with exit code {end.code}.")
        return False

    def _goes_on_after_death(self, state: _State, end: End) -> bool:
        process, failures = state.handle.process(), []
        state.handle.kill()
        self._open()
        why = f"The worker that computed it {end.died}."
        if self.blocks is not None and process is not None:
            failures = record_worker_death(self.blocks, *process, why)
        LOG.warning(
            "%s %s%s", state.handle.name, end.died, "".join(f" at block {failure.block}" for failure in failures),
            extra={"event": "worker_died", "worker": state.handle.name, "why": end.died,
                   "blocks": [failure.block for failure in failures]},
        )  # fmt: skip
        self._look(now=True)
        if self.blocks is not None and self.finished == self.blocks.count:
            return False
        self.deaths += 1
        state.early_deaths = 0 if failures else state.early_deaths + 1
        if state.early_deaths > MOST_EARLY_DEATHS or self.deaths >= MOST_DEATHS:
            count = f"{state.early_deaths} times" if state.early_deaths > 1 else "again and again"
            state.ends.append(f"{end.died}, {count}. If memory ran out: fewer workers, or a smaller batch_size.")
            state.code = FAILED
            if self.deaths >= MOST_DEATHS:
                raise self._error()
            return False
        state.handle.start()
        return True

    def _look(self, now: bool = False) -> None:
        """Looks how far the store is, from time to time, and shows it."""
        start = time.monotonic()
        if start < self.next_look and not now:
            return
        self._open()
        if self.blocks is not None:
            try:
                done = self.blocks.finished()
                self._tell_failures(self.blocks)
            except (StoreError, OSError) as error:  # the workers' own look is what counts
                LOG.debug("cannot see how far %s is: %s", self.view.where, error)
            else:
                self._show(self.blocks, done)
        end = time.monotonic()
        self.next_look = end + max(LOOK_SECONDS, (end - start) / LOOK_SHARE)

    def _open(self) -> None:
        """Opens the store, if it is there and was not opened before. What is wrong with it, the workers say."""
        if self.blocks is None:
            with suppress(StoreError, OSError):
                self.blocks = self.view.open()

    def _show(self, blocks: Blocks, done: npt.NDArray[np.bool_]) -> None:
        if int(done.sum()) != self.finished:
            self.finished, self.deaths = int(done.sum()), 0
        spans = [blocks.span(int(block)) for block in np.flatnonzero(done)]
        rows = sum(span.stop - span.start for span in spans)
        if self.bar is None:
            self.bar = progress_bar(self.view.name, blocks.rows, rows, self.view.unit, self.progress)
        if self.attempts:
            self.bar.set_postfix_str(f"{len(self.attempts)} failed", refresh=False)
        self.bar.update(rows - self.bar.n)

    def _tell_failures(self, blocks: Blocks) -> None:
        """Logs the failures that the workers have written down since the last look."""
        failures = WorkLog(blocks.store).failures()
        for block, failure in failures.items():
            if len(failure.attempts) > self.attempts.get(block, 0):
                what = "set aside" if failure.set_aside else "to be tried again"
                LOG.warning(
                    "block %d failed, %s: %s", block, what, failure.attempts[-1].why,
                    extra={"event": "block_failure_seen", "block": block, "why": failure.attempts[-1].why},
                )  # fmt: skip
        self.attempts = {block: len(failure.attempts) for block, failure in failures.items()}

    def _settle(self) -> None:
        """Returns if every block is finished; raises what is in the way."""
        self._open()
        if self.blocks is None:
            raise self._error()
        finished = self.blocks.finished()
        self.finished, left = int(finished.sum()), set(np.flatnonzero(~finished).tolist())
        failures = [failure for block, failure in sorted(forget_finished(self.blocks).items()) if block in left]
        set_aside = [failure for failure in failures if failure.set_aside]
        if left and {failure.block for failure in set_aside} == left:
            advice = "Remove the cause and run the same command again: it tries them anew."
            raise FailedBlocksError(self.view.where, set_aside, self.blocks.count, advice)
        refused = any(state.code in (BAD_INPUT, MISMATCH) for state in self.states)  # as by another campaign's store
        if left or (refused and not set_aside):
            raise self._error()
        for state in self.states:
            for said in state.ends:
                LOG.warning(
                    "%s ended early, the others did its work: %s", state.handle.name, said,
                    extra={"event": "worker_failed", "worker": state.handle.name, "why": said},
                )  # fmt: skip

    def _error(self) -> WorkersError:
        """Returns what the workers said, once, with the exit code of the most distinct_pair one."""
        said: dict[str, list[str]] = {}
        for state in self.states:
            for text in state.ends:
                said.setdefault(text, []).append(state.handle.name)
        codes = {state.code for state in self.states} - {0}
        code = next((code for code in (MISMATCH, BAD_INPUT) if code in codes), FAILED)
        if len(said) == 1 and len(next(iter(said.values()))) == len(self.states) and code != FAILED:
            return WorkersError(next(iter(said)), code)  # all were refused alike, as one process would have been
        lines = [f"{' and '.join(names)}: {text}" for text, names in said.items()]
        far = "" if self.blocks is None else f" ({self.finished} of {self.blocks.count} are)"
        first = f"{self.view.where}: the workers ended before all blocks were finished{far}."
        last = "Finished blocks stay: run the same command again to go on from here."
        return WorkersError("\n".join([first, *lines, last]), code)


def _end(working: Sequence[_State], blocks: Blocks | None) -> None:
    """Ends workers: those that do not end in order in time are killed, so that none is left."""
    try:
        for state in working:
            state.handle.stop()
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and any(state.handle.poll() is None for state in working):
            time.sleep(POLL_SECONDS / 2)
    finally:
        for state in working:
            process = state.handle.process()
            state.handle.kill()
            if blocks is not None and process is not None:
                record_stop(blocks, *process)
