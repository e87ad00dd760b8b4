"""What can go wrong with files of other programs. Messages say where, got, expected, what to do."""

from __future__ import annotations

from coar.errors import CoarError


class InterchangeError(CoarError, ValueError):
    """A file or folder that cannot be imported as data, or an export that cannot be written as asked."""
