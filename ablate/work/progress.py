"""Progress of long work: a bar in a terminal or notebook, one line now and then in a log file. Always on stderr."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from ablate.engine.ticks import Listener
from stores.blocks.blocks import Blocks

LOG = logging.getLogger("ablate.progress")
LOG_SECONDS = 10
TICK_SECONDS = 1.0  # how often a bar that people watch shows the time that passes
LOOK_SECONDS = 5.0  # how often others' work is looked for, at most
LOOK_SHARE = 0.01  # of the time that may go into looking
JOIN_SECONDS = 5.0
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class _Lines:
    """A text stream that ends every message of a progress bar with a new line, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(what: str, total: int, done: int, unit: str, show: bool, bar_format: str | None = None) -> Any:
    """Returns a tqdm bar (a context manager with `update`) that tells rate and time left.

    `done` of `total` are finished before it starts and do not count towards the rate. Shows nothing where nothing is
    left to do.
    """
    options: dict[str, Any] = {"desc": what, "total": total, "initial": done, "unit": unit, "bar_format": bar_format}
    options["disable"] = not show or done >= total
    if not _is_watched():
        lines = _Lines(sys.stderr)
        options |= {"file": lines, "mininterval": LOG_SECONDS, "ascii": True, "ncols": 100, "position": 0}
    return _tqdm()(miniters=1, **options)


@functools.cache
def _tqdm() -> Any:
    """Returns tqdm's bar for a notebook or for text, imported when used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where a notebook lacks ipywidgets; lines of text will do
        from tqdm.auto import tqdm
    return tqdm


def _in_notebook() -> bool:
    return any(base.__module__ == "tqdm.notebook" for base in _tqdm().__mro__)


def _is_watched() -> bool:
    """Returns whether a bar that moves can be shown: in a notebook with widgets, or in a terminal."""
    return _in_notebook() or sys.stderr.isatty()


class BlockProgress:
    """The progress of work that is done block by block, by this process and by others. A context manager.

    While it is entered and shown, a thread looks now and then which blocks others have finished. Others' rows count
    towards the rate from when this process has finished a block of its own: before, a block that was nearly finished
    when this process came would pass for a very fast one.

    Args:
      what, unit: As for `progress_bar`.
      blocks: The blocks, open for writing.
      show: Show it.
      work: How many forwards a row of the store takes, as `engine/ticks.py` tells; None: learnt from the first block.
      failed: Returns how many blocks have failed.
      clock: Seconds, for tests.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        blocks: Blocks,
        show: bool,
        work: float | None = None,
        failed: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._unit, self._blocks, self._show = what, unit, blocks, show
        self._work, self._failed, self._clock = work, failed, clock
        self._done: set[int] = set()
        self._rows = self._initial = 0  # finished, by anyone: now, and at the start
        self._own = 0  # rows this process has computed
        self._partial = 0.0  # rows' worth of the block at hand
        self._ticks = 0
        self._failures = 0
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._bar: Any = None

    def __enter__(self) -> BlockProgress:
        if not self._show:
            return self
        self._see()
        self._initial = self._rows
        if self._initial >= self._blocks.rows:
            return self
        self._began = self._clock()
        self._failures = self._failed()
        self._bar = progress_bar(self._what, self._blocks.rows, self._initial, self._unit, True, FORMAT)
        self._thread = threading.Thread(target=self._keep_looking, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)  # it may be waiting for storage
        with self._lock:
            self._draw()
            self._bar.close()
            self._bar = None

    def begin(self, block: int) -> Listener | None:
        """Says that this process begins a block; returns what wants to know of every forward, None if nothing does."""
        if self._bar is None:
            return None
        self._ticks, rows = 0, self._size(block)

        def listener(forwards: int) -> None:
            self._ticks += forwards
            if self._work:
                self._partial = rows * min(1.0, self._ticks / (self._work * rows))
                if int(self._rows + self._partial) != self._bar.n:
                    self._draw()

        return listener

    def settle(self, block: int, finished: bool) -> None:
        """Says that the block is finished, or has failed."""
        if self._bar is None:
            return
        with self._lock:
            self._partial = 0.0
            if finished:
                self._add({block})
                self._own += self._size(block)
                self._work = self._ticks / self._size(block) or self._work
            else:
                self._failures = self._failed()
            self._draw()

    def look(self) -> None:
        """Looks now which blocks are finished or have failed, whoever did it. Cost: one look at the ledger."""
        if self._bar is None:
            return
        self._see()
        self._failures = self._failed()
        self._draw()

    def _see(self) -> None:
        flags = self._blocks.finished()
        with self._lock:
            self._add({int(block) for block in flags.nonzero()[0]})

    def _add(self, blocks: set[int]) -> None:
        for block in blocks - self._done:
            self._rows += self._size(block)
        self._done |= blocks

    def _size(self, block: int) -> int:
        span = self._blocks.span(block)
        return int(span.stop - span.start)

    def _keep_looking(self) -> None:
        watched, due = _is_watched(), self._clock() + LOOK_SECONDS
        while not self._stop.wait(TICK_SECONDS):
            start = self._clock()
            if start >= due:
                try:
                    self.look()
                except Exception as error:  # whatever storage raises: the worker will meet it, too
                    LOG.debug("Others' progress could not be read: %s", error)
                now = self._clock()
                due = now + max(LOOK_SECONDS, (now - start) / LOOK_SHARE)
            with self._lock:
                if watched and self._bar is not None and not self._stop.is_set():
                    self._draw()
                    self._bar.refresh()

    def _draw(self) -> None:
        with self._lock:
            if self._bar is None:
                return
            self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update(int(self._rows + self._partial) - self._bar.n)

    def rate(self) -> float | None:
        """Returns rows per second, of all workers as soon as that can be told; None while nothing is known."""
        passed = self._clock() - self._began
        own = self._own + self._partial
        rows = self._rows - self._initial + self._partial if self._own else own
        return rows / passed if rows > 0 and passed > 0 else None

    def _text(self) -> str:
        rate = self.rate()
        left = self._blocks.rows - self._rows - self._partial
        parts = [f"{short_number(rate)} {self._unit}s/s" if rate else f"? {self._unit}s/s"]
        if rate and left > 0:
            parts.append(f"{_tqdm().format_interval(left / rate)} left")
        if self._failures:
            parts.append(f"{self._failures} failed")
        return ", ".join(parts)


def short_number(value: float) -> str:
    """Returns a positive number with three figures that matter, for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
