"""Recording one run: every use of a watched weight, what else touches it, and who reads what convolutions make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ablate.gating.routing import Routes
from ablate.gating.uses import Op, UseMode, WeightRows
from ablate.models.calls import Calls, name_of, tensors_in
from ablate.models.stack import Frame, Stack, version_of

READ_BY_PYTHON: dict[Any, str] = {Tensor.tolist: "tolist()", Tensor.numpy: "numpy()", Tensor.__array__: "numpy"}


@dataclass
class Event:
    """One use of one watched weight in one run.

    Attributes:
      untouched: Whether input and output still held the values of this use when the module's forward ended: the same
        memory alone does not say so, as a layer may work on in place.
      moved: Why the places of examples depend on what they are (see `routing`), None: they do not.
    """

    parameter: str
    op: Op
    rows: WeightRows
    frame: Frame
    x: Tensor
    y: Tensor
    untouched: bool = False
    moved: str | None = None


class Recorder(UseMode):
    """Records the uses of watched weights, what else touches them, and who consumes the output of convolutions.

    Args:
      watched: The weights by name.
      stack: What knows whose forward is running.
      routes: Follows the examples through the run, where it is there.
      touches: Find out what is `untouched`, for which values are kept until their module's forward ends.
    """

    def __init__(
        self, watched: Mapping[str, Tensor], stack: Stack, routes: Routes | None = None, touches: bool = False
    ) -> None:
        super().__init__(watched)
        self._touches = touches
        self.stack = stack
        self.calls = Calls(stack)
        self.routes = routes
        self.events: list[Event] = []
        self.strange: dict[str, str] = {}
        self.attention = False
        self.convolved: dict[int, Tensor] = {}  # kept alive, so that ids stay theirs
        self.consumers: dict[int, list[tuple[Any, Frame]]] = {}
        self._pending: dict[int, tuple[Event, int, int, Tensor, Tensor]] = {}  # by frame, until its forward ends
        stack.left = self._left

    def before(self, name: str, op: Op, rows: WeightRows, x: Tensor) -> Tensor:
        """Notes who reads the input."""
        self._consume(op.name, (x,))
        return x

    def after(self, name: str, op: Op, rows: WeightRows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Notes the use."""
        frame = self.stack.top
        frame.uses += 1
        event = Event(name, op, rows, frame, x, y)
        if self.routes is not None:
            event.moved = self.routes.moved(x) or self.routes.moved(y)
        if self._touches:
            self._pending[id(frame)] = (event, version_of(x), version_of(y), x.clone(), y.clone())
        self.events.append(event)
        if op.name == "conv2d":
            self.convolved[id(y)] = y
        return y

    def other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Notes what touches a watched weight in another way."""
        if self.routes is not None:
            self._follow(function, args)
        result = function(*args, **kwargs)
        flat = list(tensors_in((args, kwargs)))
        if any(True for _ in tensors_in(result)):
            for tensor in flat:
                if id(tensor) in self.watched:
                    name = name_of(function)
                    where = self.stack.top.module or "the model itself"
                    self.strange.setdefault(self.watched[id(tensor)], f"{name} in {where!r}")
            self._consume(function, flat)
        if function is torch.conv2d:
            self.convolved[id(result)] = result
        self.attention |= function is F.scaled_dot_product_attention
        return result

    def _follow(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Tells the routes what no operation shows: numbers read by Python, and autograd switched off."""
        if self.routes is None:
            return
        if function in READ_BY_PYTHON:
            self.routes.read(args[0], READ_BY_PYTHON[function])
        elif function is torch._C._set_grad_enabled and args == (False,):
            self.routes.cuts.setdefault("torch.no_grad()", self.stack.top.module)

    def _left(self, frame: Frame) -> None:
        """Looks, when a module's forward ends, at whether its use's input and output are what they were."""
        if (pending := self._pending.pop(id(frame), None)) is None:
            return
        event, x_version, y_version, x, y = pending
        versions = version_of(event.x) == x_version == frame.version and version_of(event.y) == y_version
        event.untouched = versions and _equal(event.x, x) and _equal(event.y, y)

    def _consume(self, function: Any, tensors: Any) -> None:
        for tensor in tensors:
            if id(tensor) in self.convolved:
                self.consumers.setdefault(id(tensor), []).append((function, self.stack.top))


def _equal(one: Tensor, two: Tensor) -> bool:
    """Returns whether values are the same, NaN where NaN was: `.data` and numpy write without a count."""
    return torch.equal(one, two) or bool(((one == two) | (two != two)).all())
