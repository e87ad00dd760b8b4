"""What long commands tell while they run: options for log lines and TensorBoard curves, and what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ablate.work.logs import log_to, warnings_to_stderr
from ablate.work.tensorboard import scalars_to

PANEL = "What it tells meanwhile"


class LogFormat(StrEnum):
    """How an event is written."""

    text = "text"
    json = "json"


LogTarget = Annotated[
    str | None,
    typer.Option(
        "--log", metavar="FILE|-", help="Append a line per event to a file; -: stderr.", rich_help_panel=PANEL
    ),
]
LogLines = Annotated[
    LogFormat, typer.Option("--log-format", help="Of these lines: json is for programs.", rich_help_panel=PANEL)
]
Curves = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard", metavar="DIR", help="Draw curves for TensorBoard in a folder.", rich_help_panel=PANEL
    ),
]


@contextmanager
def logging_to(
    log: str | None, log_format: LogFormat = LogFormat.text, tensorboard: Path | None = None, quiet: bool = False
) -> Iterator[None]:
    """While entered, what happens is logged and drawn as asked; unless quiet, trouble is told on stderr in any case."""
    with ExitStack() as stack:
        if log is not None:
            stack.enter_context(log_to(log, log_format.value))
        if log != "-" and not quiet:
            stack.enter_context(warnings_to_stderr())
        if tensorboard is not None:
            stack.enter_context(scalars_to(tensorboard))
        yield
