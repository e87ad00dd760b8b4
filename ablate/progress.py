"""Progress of long work: a bar in a terminal or notebook, one line now and then in a log file. Always on stderr."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

LOG_SECONDS = 10


class _Lines:
    """A text stream that ends every message of a progress bar with a new line, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(what: str, total: int, done: int, unit: str, show: bool) -> Any:
    """Returns a tqdm bar (a context manager with `update`) that tells rate and time left.

    `done` of `total` are finished before it starts and do not count towards the rate. Shows nothing where nothing is
    left to do.
    """
    options: dict[str, Any] = {"desc": what, "total": total, "initial": done, "unit": unit}
    options["disable"] = not show or done >= total
    in_notebook = "notebook" in tqdm.__module__
    if not in_notebook and not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_SECONDS, "ascii": True, "ncols": 100}
    return tqdm(**options)
