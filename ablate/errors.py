"""What a user can get wrong. Every message says where, what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

FAILED, BAD_INPUT, NOT_FINISHED, MISMATCH = 1, 2, 3, 4  # exit codes of the command line


class AblateError(Exception):
    """Base class of the errors of this package."""


class UnknownNameError(AblateError, LookupError):
    """A name that is none of the known ones; the message offers the nearest."""

    def __init__(self, what: str, name: str, known: Iterable[str], advice: str = "") -> None:
        names = list(known)
        self.name = name
        self.nearest = nearest(name, names)
        hint = f" Did you mean {' or '.join(map(repr, self.nearest))}?" if self.nearest else ""
        listing = f" Known: {', '.join(names)}." if 0 < len(names) <= 12 and not hint else ""
        super().__init__(f"No {what} {name!r}.{hint}{listing}{' ' + advice if advice else ''}")


class SelectionError(AblateError, ValueError):
    """A selection that cannot be what the user meant."""


class ModelMismatchError(AblateError, ValueError):
    """A model that is not the one an index or edit was made for."""


class GatingError(AblateError, ValueError):
    """A model that cannot be run or gated as asked; the message names the module."""


class NoGradientError(GatingError):
    """Gates that change the outputs, but whose gradient autograd does not have; `modules` names theirs."""

    def __init__(self, modules: Iterable[str], cause: str) -> None:
        self.modules = tuple(modules)
        self.cause = cause
        names = ", ".join(map(repr, self.modules[:3]))
        more = f" and {len(self.modules) - 3} more" if len(self.modules) > 3 else ""
        super().__init__(
            f"No gradient reaches the components of {names}{more}, although their gates change the outputs: {cause}. "
            f"Leave them out with exclude=[...], make it differentiable, or use what needs outputs only: outputs(), "
            "example_outputs(), regression, leave_one_out()."
        )


class KeepError(AblateError, ValueError):
    """A keep array of the wrong type, dtype or shape."""


class DataError(AblateError, ValueError):
    """Examples that cannot be used as they are."""


class LabelError(DataError):
    """Labels outside the model's classes."""


class OutOfMemoryError(AblateError, MemoryError):
    """The device's memory did not suffice; the message says what to lower."""


class LoadError(AblateError):
    """A model or data set that cannot be loaded."""


class NonFiniteOutputError(AblateError, ArithmeticError):
    """A NaN or infinite output or gradient; `row`, `example` and, of a gradient, `component` say where."""

    def __init__(
        self, row: int, example: int, value: float, example_id: str | None = None, component: int | None = None
    ) -> None:
        self.row, self.example, self.value, self.component = row, example, value, component
        name = f" (id {example_id!r})" if example_id is not None else ""
        what = f"Output of keep row {row}" if component is None else f"The gradient of component {component}"
        super().__init__(
            f"{what} on example {example}{name} is {value}, expected a finite number. Nothing of "
            "this block was stored. Check that input and the model for overflow, or ablate a smaller fraction."
        )


class ImmutableError(AblateError, AttributeError):
    """An attribute of a value that never changes was to be changed."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind}.{name} cannot be changed: a {kind} never changes. Make another one instead.")


class SpecError(AblateError, ValueError):
    """Everything that is wrong with a campaign spec, in one message."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{where}: {count}\n" + "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1)))


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Returns the known names most like `name`, best first; empty if none is close."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)
