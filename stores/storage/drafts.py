"""Names for what is written beside its place and then renamed to it, so that readers see the whole or nothing."""

from __future__ import annotations

import glob
import uuid
from collections.abc import Iterator
from pathlib import Path

DIGITS = 8


def draft_of(path: Path) -> Path:
    """Returns a path beside this one that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:DIGITS]}.draft")


def drafts_of(path: Path) -> Iterator[Path]:
    """Yields the drafts of a path that are there: of programs at work, or left by those that were killed."""
    return path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * DIGITS}.draft")
