"""Timing reads and writes of files: with and without the page cache, medians, and Markdown rows."""

from __future__ import annotations

import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def seconds(call: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forget(place: Path) -> None:
    """Drops the files of a place from the page cache, so that they are read from the disk again.

    Only what is on the disk already can be dropped: call `os.sync` once after writing.
    """
    for file in files_of(place):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_of(place: Path) -> list[Path]:
    """Returns the files of a place, which may be a file itself."""
    return [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]


def cold_and_warm(calls: Sequence[Callable[[], object]], place: Path) -> tuple[float, float]:
    """Returns the median seconds of calls that read from a place: from the disk, and from the page cache."""
    calls[0]()  # what is imported and opened once
    cold, warm = [], []
    for call in calls:
        forget(place)
        cold.append(seconds(call))
        warm.append(seconds(call))
    return statistics.median(cold), statistics.median(warm)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a Markdown table: text to the left, all else to the right."""
    rows = list(rows)
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def paragraph(text: str) -> list[str]:
    """Returns a text in lines, with an empty one after it."""
    return [*textwrap.wrap(text, 120), ""]


def gib(size: float) -> str:
    """Returns a size in bytes as GiB, or MiB where it is small."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
