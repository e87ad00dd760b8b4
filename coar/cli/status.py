"""The command that tells how far a store is: once, as JSON, or again and again until it is finished."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ablate.errors import FAILED, NOT_FINISHED
from ablate.work.progress import short_number
from ablate.work.status import ALIVE, LOST, SILENT, FailedBlock, Status, Watch, WorkerStatus
from coar.cli.common import Json, print_json, say
from coar.cli.storage import Storage, located

MOST_LINES = 20  # of workers or failed blocks that are listed; --json has them all
ENDED, STOPPED = "ended", "stopped"

AnyStore = Annotated[str, typer.Argument(metavar="STORE", help="A campaign or attribution store.")]
Following = Annotated[bool, typer.Option("--watch", help="Look again and again, until it is finished.")]
Every = Annotated[float, typer.Option(min=0.1, help="For --watch: seconds between two looks.")]


def status(
    store: AnyStore, watch: Following = False, every: Every = 2.0, storage: Storage = None, as_json: Json = False
) -> None:
    """Show how far a campaign or an estimate is: blocks, workers, speed, time and cost left, failures.

    Exit codes: 0 complete, 3 not finished (or blocks were set aside), 1 damaged.
    """
    watching = Watch(located(storage, store))
    if watch:
        found = _follow(watching, every, as_json)
    else:
        found = watching.look()
        if as_json:
            print_json(found.describe())
        else:
            say(told(found))
    if found is not None and found.damaged:
        raise typer.Exit(FAILED)
    if found is None or not found.complete:
        raise typer.Exit(NOT_FINISHED)


def _follow(watching: Watch, every: float, as_json: bool) -> Status | None:
    """Shows every change until nothing is left to do, or Ctrl-C. Returns what was seen last."""
    found: Status | None = None
    screen, show = _shown(as_json)
    try:
        with screen:
            for found in _looks(watching, every):
                show(found)
    except KeyboardInterrupt:
        pass
    return found


def _looks(watching: Watch, every: float) -> Iterator[Status]:
    while True:
        found = watching.look()
        yield found
        if found.settled or (found.damaged and not found.count(ALIVE, SILENT)):
            return
        time.sleep(every)


def _shown(as_json: bool) -> tuple[AbstractContextManager[object], Callable[[Status], None]]:
    """Returns what shows a status: JSON lines, a picture that changes (in a terminal), or a line per change."""
    if not as_json and sys.stdout.isatty():
        live = Live(console=Console(highlight=False, markup=False, emoji=False), auto_refresh=False)
        return live, lambda found: live.update(Text(told(found)), refresh=True)
    last: list[object] = [None]

    def show(found: Status) -> None:
        if _what_matters(found) != last[0]:
            last[0] = _what_matters(found)
            line = json.dumps(found.describe(), allow_nan=False) if as_json else _line(found)
            print(line, flush=True)  # noqa: T201

    return nullcontext(), show


def _what_matters(found: Status) -> object:
    """Returns what a new line is worth: not every heart-beat."""
    states = tuple((worker.id, worker.state) for worker in found.workers)
    attempts = tuple((failure.block, failure.attempts) for failure in found.failures)
    return found.finished_blocks, found.running_blocks, states, attempts, found.damaged


def told(found: Status) -> str:
    """Returns a status as lines for people."""
    lines = [_headline(found), *_outlook(found)]
    shown = [worker for worker in found.workers if worker.state in (ALIVE, SILENT, LOST)]
    if shown and not found.settled:
        lines += ["Workers:", *_at_most([_worker(worker) for worker in shown], "workers")]
    if found.failures:
        lines += ["Failed blocks:", *_at_most([_failure(f, found) for f in found.failures], "failed blocks")]
    if found.damaged:
        advice = f"`coar verify {found.store}` reads everything and names all damaged blocks."
        lines += ["Damaged:", *(f"  {text}" for text in found.damaged), f"  {advice}"]
    return "\n".join(lines)


def _headline(found: Status) -> str:
    state = "complete" if found.complete else "damaged" if found.damaged else "not finished"
    share = f"{found.finished_rows:,} of {found.rows:,} {found.unit}s ({found.finished_rows / found.rows:.0%})"
    examples = f"{found.examples:,} examples, " if found.kind == "campaign" else ""
    return (
        f"{found.store}: {state}, {share}, {found.finished_blocks} of {found.blocks} blocks; "
        f"{examples}{found.components:,} components."
    )


def _outlook(found: Status) -> list[str]:
    """Returns what is going on, how long it will take, and what was stored."""
    counted = [
        (found.running_blocks, "running"),
        (found.failed_blocks, "failed and to be tried again"),
        (found.set_aside_blocks, "set aside"),
    ]
    lines = []
    if any(count for count, _ in counted):
        parts = [f"{count} {what}" for count, what in counted if count]
        lines.append(f"Blocks that are not finished: {', '.join(parts)}.")
    if found.settled and found.set_aside_blocks:
        lines.append("All others are finished. Remove the causes below and run the same command again.")
    elif not found.settled:
        lines += _time_left(found)
    people = [(found.count(state), state) for state in (ALIVE, SILENT, LOST, ENDED, STOPPED)]
    workers = ", ".join(f"{count} {state}" for count, state in people if count)
    size = "" if found.bytes is None else f" {short_bytes(found.bytes)} stored."
    lines.append((f"Workers: {workers}." if workers else "No worker has left a record.") + size)
    return lines


def _time_left(found: Status) -> list[str]:
    cost = found.worker_hours_left
    work = "" if cost is None else f" About {short_time(cost * 3600)} of one worker's time are left."
    if not found.count(ALIVE, SILENT):
        return [f"Nobody is at it: run the same command again to go on.{work}"]
    if found.rows_per_second is None or found.eta_seconds is None:
        return [f"The speed is not known yet.{work}"]
    rate = f"{short_number(found.rows_per_second)} {found.unit}s/s"
    return [f"{rate}; finished in about {short_time(found.eta_seconds)}.{work}"]


def _line(found: Status) -> str:
    """Returns a status as one line, for logs."""
    parts = [f"{found.finished_rows:,} of {found.rows:,} {found.unit}s ({found.finished_rows / found.rows:.0%})"]
    parts.append(f"{found.finished_blocks} of {found.blocks} blocks")
    counts = [
        (found.running_blocks, "running"),
        (found.failed_blocks, "to be tried again"),
        (found.set_aside_blocks, "set aside"),
        (len(found.damaged), "damaged"),
    ]
    parts += [f"{count} {what}" for count, what in counts if count]
    alive = found.count(ALIVE)
    parts.append(f"{alive} {'worker' if alive == 1 else 'workers'} alive")
    parts += [f"{found.count(state)} {state}" for state in (SILENT, LOST) if found.count(state)]
    if found.rows_per_second and found.eta_seconds is not None and not found.settled:
        parts.append(f"{short_number(found.rows_per_second)} {found.unit}s/s")
        parts.append(f"about {short_time(found.eta_seconds)} left")
    return f"{time.strftime('%H:%M:%S')} {', '.join(parts)}"


def _worker(worker: WorkerStatus) -> str:
    where = worker.id if worker.device is None else f"{worker.id} ({worker.device})"
    at = "" if worker.at is None else f", at block {worker.at}"
    speed = "" if worker.rows_per_second is None else f", {short_number(worker.rows_per_second)}/s"
    seen = ""
    if worker.state != ALIVE:
        ago = "" if worker.seen_seconds_ago is None else f" {short_time(max(0.0, worker.seen_seconds_ago))} ago"
        seen = f", last seen{ago} by its own clock ({worker.seen})"
    return f"  {where}: {worker.state}{at}, {worker.blocks} blocks, {worker.rows:,} rows{speed}{seen}"


def _failure(failure: FailedBlock, found: Status) -> str:
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    aside = ", set aside" if failure.set_aside else ""
    rows = f"{found.unit}s {failure.first} to {failure.last}"
    why = failure.why.replace("\n", "\n    ")
    return f"  block {failure.block} ({rows}) failed {times}{aside}: {why}\n    {failure.advice}"


def _at_most(lines: list[str], what: str) -> list[str]:
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"  and {more} more {what}: see --json"]


def short_bytes(count: int) -> str:
    """Returns a number of bytes for people."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def short_time(seconds: float) -> str:
    """Returns a time span for people, in at most two units."""
    whole = round(seconds)
    for size, name, below, next_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name} {rest} {next_name}" if rest else f"{whole // size} {name}"
    return f"{whole} s"
