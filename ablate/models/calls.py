"""Which functions a forward calls, in which module, in which order and on what: a network's code, seen from outside.

Weights alone do not say what a network computes: with ReLU or GELU, with stride 1 or 2, they are the same. So the probe
writes down every function that makes or changes a tensor, with its settings, and which earlier results it takes.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ablate.models.stack import Stack

ITSELF = "(model)"  # the name of the model among its modules
LONGEST = 400  # characters of a line that is kept as it is
_CHANGES_ONLY = {"__setitem__"}  # returns nothing, and changes a tensor
_MOVES = {"to", "cuda", "cpu"}  # where a tensor is says nothing of what is computed
_NO_MATTER = {"device", "dtype", "inplace", "training"}  # arguments; training is over


class Calls(TorchFunctionMode):
    """Writes down the calls of one forward. Keeps no tensor alive.

    Args:
      stack: Says which module is running.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self._stack = stack
        self._lines: dict[str, list[str]] = {}
        self._order: list[str] = []
        self._flow = hashlib.sha256()
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [self._number(tensor) for tensor in tensors_in((args, kwargs))]
        result = function(*args, **kwargs)
        name = name_of(function)
        made = list(tensors_in(args[:1] if name in _CHANGES_ONLY else result))
        if name in _MOVES:
            self._number_as(made, operands[0] if operands else 0)
        elif made:
            self._note(name, args, kwargs, operands)
            self._number_as(made, self._count)
        return result

    def describe(self) -> dict[str, Any]:
        """Returns the calls per module, the order of modules, and a hash of what was computed from what; JSON-able."""
        return {
            "calls": {module: shortened(", ".join(lines)) for module, lines in sorted(self._lines.items())},
            "order": shortened(", ".join(self._order)),
            "flow": self._flow.hexdigest(),
        }

    def _note(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], operands: list[int]) -> None:
        self._count += 1
        module = self._stack.top.module or ITSELF
        named = (f"{key}={value}" for key in sorted(set(kwargs) - _NO_MATTER) for value in _settings([kwargs[key]]))
        settings = "" if name.endswith("dropout") else ", ".join([*_settings(args), *named])  # off in eval mode
        self._lines.setdefault(module, []).append(f"{name}({settings})")
        if not self._order or self._order[-1] != module:
            self._order.append(module)
        self._flow.update(f"{module} {name} {operands};".encode())

    def _number_as(self, tensors: list[Tensor], number: int) -> None:
        for tensor in tensors:
            self._made[id(tensor)] = weakref.ref(tensor), number

    def _number(self, tensor: Tensor) -> int:
        """Returns which call made a tensor, 0 for inputs and weights."""
        reference, number = self._made.get(id(tensor), (None, 0))
        return number if reference is not None and reference() is tensor else 0


def name_of(function: Callable[..., Any]) -> str:
    """Returns what a user calls a function; an attribute like `weight.T` comes as the `__get__` of its descriptor."""
    name = getattr(function, "__name__", str(function))
    return f".{getattr(function.__self__, '__name__', '?')}" if name == "__get__" else name  # type: ignore[attr-defined]


def shortened(text: str) -> str:
    """Returns a text, the end of a long one as its hash."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _settings(values: Any) -> Iterator[str]:
    """Yields the numbers, texts and switches among arguments; not where a tensor is or of which type."""
    for value in values:
        if isinstance(value, (bool, int, str)):
            yield str(value)
        elif isinstance(value, float):
            yield f"{value:.9g}" if math.isfinite(value) else str(value)
        elif isinstance(value, slice):
            yield ":".join("" if part is None else str(part) for part in (value.start, value.stop, value.step))
        elif isinstance(value, (tuple, list)):
            yield f"[{' '.join(_settings(value))}]"


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yields the tensors among values, also those in tuples, lists and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
