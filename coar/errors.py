"""What can go wrong when estimating, asking and editing. Messages say where, got, expected, what to do."""

from __future__ import annotations


class CoarError(Exception):
    """Base class of the errors of this package."""


class FitError(CoarError, ValueError):
    """A fit that cannot be done with this data or budget."""


class QueryError(CoarError, LookupError):
    """A question about something that is not there."""


class EditError(CoarError, ValueError):
    """An edit that cannot be what the user meant."""


class EditMismatchError(CoarError, ValueError):
    """A model that is not the one an edit was made for."""
