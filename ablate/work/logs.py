"""Log lines of long work, one per event: text for people or JSON for programs, to a file or to stderr.

The packages tell what happens through `logging` and configure nothing: without `log_to`, or handlers of your own on
the loggers `ablate`, `coar` and `stores`, nothing is shown. Events of the workers have an `event` and, where it
applies, `worker`, `block`, `rows`, `seconds` and `why` as attributes of the record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

from ablate.errors import UnknownNameError
from stores.storage.places import user_path
from stores.storage.redact import redact

LOGGERS = ("ablate", "stores", "coar")
STDERR = "-"
_STANDARD = {*vars(logging.LogRecord("", 0, "", 0, "", (), None)), "message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object per event: time (UTC), level, event, message, and what the event is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a line without its end."""
        found = {"time": _time(record), "level": record.levelname.lower(), "event": "message"}
        return json.dumps(_plain({**found, "message": record.getMessage(), **facts_of(record)}))


class TextLines(logging.Formatter):
    """One line per event: time (UTC), level, message; what belongs to it (a traceback) is indented below."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a line, or more of them, without the last end."""
        message = redact(record.getMessage())
        trace = redact(str(facts_of(record).get("trace", "")))
        return f"{_time(record)} {record.levelname:<7} {message}\n{trace}".rstrip().replace("\n", "\n    ")


class BriefLines(logging.Formatter):
    """The message alone with its level, for people who see it at once."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a line without its end."""
        return f"{record.levelname.lower()}: {redact(record.getMessage())}"


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """Returns what an event is about: the attributes given to it, `rows_per_second`, and the traceback of an error."""
    facts = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if facts.get("rows") and facts.get("seconds"):
        facts["rows_per_second"] = round(facts["rows"] / facts["seconds"], 3)
    if record.exc_info and record.exc_info[0] is not None:
        facts.setdefault("trace", logging.Formatter().formatException(record.exc_info))
    return facts


FORMATS: Mapping[str, type[logging.Formatter]] = {"text": TextLines, "json": JsonLines}


@contextmanager
def log_to(
    target: str | os.PathLike[str] | TextIO, log_format: str = "text", level: int = logging.INFO
) -> Iterator[None]:
    """While entered, every event of the packages is written as a line. Changes loggers, and puts them back.

    Args:
      target: A file that is appended to (made, with its folder, if there is none); "-" for stderr, above a progress
        bar if there is one; or an open text stream.
      log_format: "text" or "json". Credentials in messages are hidden in both.
      level: The lowest that is written.

    Raises:
      UnknownNameError: Another format.
      OSError: The file cannot be written.
    """
    if log_format not in FORMATS:
        raise UnknownNameError("log format", log_format, FORMATS)
    handler = _handler(target)
    handler.setFormatter(FORMATS[log_format]())
    with attached(handler, level):
        yield


@contextmanager
def warnings_to_stderr() -> Iterator[None]:
    """While entered, events that are trouble (a block failed, storage does not answer) are lines on stderr."""
    handler = _Above()
    handler.setFormatter(BriefLines())
    with attached(handler, logging.WARNING):
        yield


@contextmanager
def attached(handler: logging.Handler, level: int = logging.INFO) -> Iterator[None]:
    """While entered, a handler gets the events of the packages from a level on; it is closed at the end."""
    handler.setLevel(level)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(min(level, logger.getEffectiveLevel()))
            logger.addHandler(handler)
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old)
        handler.close()


def _handler(target: str | os.PathLike[str] | TextIO) -> logging.Handler:
    if not isinstance(target, str | os.PathLike):
        return _Stream(target)
    if target == STDERR:
        return _Above()
    path = user_path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _File(
        path, encoding="utf-8", errors="backslashreplace"
    )  # appended to, so that several workers may share one


class _SaysOnce(logging.Handler):
    """Says once that lines cannot be written any more: a full disk must not end the work, nor fill the screen."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that `logging` calls
        if not self._said:
            self._said = True
            sys.stderr.write(f"warning: Lines cannot be logged any more: {sys.exc_info()[1]}. The work goes on.\n")


class _File(_SaysOnce, logging.FileHandler):
    pass


class _Stream(_SaysOnce, logging.StreamHandler[TextIO]):
    pass


class _Above(_SaysOnce):
    """Writes lines to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every handler of `logging` does
            self.handleError(record)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    """Returns a value that JSON knows, without credentials; what is no finite number is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return redact(str(value))
