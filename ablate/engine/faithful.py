"""The proof that a copy of a model responds: what its weights do is what the user's own live model does with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablate.errors import GatingError
from ablate.gating.attention import no_fast_path
from ablate.gating.closeness import gap
from ablate.gating.literal import attenuate_memory
from ablate.index.components import Selection
from ablate.logits import tensors_in
from ablate.models.lending import lent
from ablate.models.sharing import Extent
from ablate.state import preserved_random_state

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}  # of a logit
ROUGH = 5e-2  # in lower precisions
ADVICE = (
    "Some function runs the original's weights where a copy should run its own (a closure, a lambda, a patched "
    "forward). Make it a method of a class that finds its layers on self, or wrap the model in a module that calls it."
)


class UnprovenError(GatingError):
    """A copy returned something else than its original; the cause may be another, such as chance."""


def doubts(model: nn.Module, copied: nn.Module, selection: Selection, inputs: Tensor) -> UnprovenError | None:
    """Returns what `prove` finds where the cause may be another, for the caller to raise if it finds no other.

    Raises:
      GatingError: The copy does not respond; names the weights.
    """
    try:
        prove(model, copied, selection, inputs)
    except UnprovenError as doubt:
        return doubt
    return None


def prove(model: nn.Module, copied: nn.Module, selection: Selection, inputs: Tensor) -> None:
    """Raises unless a copy of a model responds to changed weights as the model itself does. Mutates nothing.

    The selection's weights become zero in the live model, which then runs, and is put back bit for bit. The same is
    done to a copy. It must use every weight that the model uses, none of the model's own, and return the same.
    If the model's weights have changed since it was copied, they are for that time what they were.

    Args:
      model: The live model, on any device, in any dtype and mode.
      copied: Its copy, which has not run; copied again.
      selection: What becomes zero; every weight is looked at, selected or not.
      inputs: At least one example, floating ones in any dtype.

    Cost: two forwards, and a copy of the model.

    Raises:
      GatingError: Names weights that the copy does not use, or of which it uses the original's.
      UnprovenError: They return different numbers, or only one of them runs.
    """
    trial = _placed_like(model, copy.deepcopy(copied))
    values = {name: parameter.detach() for name, parameter in trial.named_parameters()}
    theirs, ours = _storages(model), _storages(trial)
    inputs = _as_taken(inputs, model)
    with lent(model, values) as memory:
        live = _run(model, memory, selection, inputs)
    own = _run(trial, values, selection, inputs)
    _require_own_weights(model, {theirs[s] for s in own.read & theirs.keys()}, "reads {} of the original's memory")
    if own.error is None:
        used = {ours[s] for s in own.read & ours.keys()}
        left = {theirs[s] for s in live.read & theirs.keys()} - used
        _require_own_weights(model, left & set(ours.values()), "does not use {}, which the model uses")
    _require_equal(model, own, live)


@dataclass
class _Ran:
    """What a forward returned or raised, and the memory that it read."""

    output: Any = None
    error: Exception | None = None
    read: set[int] = field(default_factory=set)


def _run(model: nn.Module, memory: Mapping[str, Tensor], selection: Selection, inputs: Tensor) -> _Ran:
    """Runs a model without a selection; what it raises is part of the answer. Leaves the memory of its weights so."""
    reads = _Reads()
    with torch.inference_mode():  # may write into what was made in it
        attenuate_memory(memory, selection, 0.0)
    try:
        with preserved_random_state(), torch.no_grad(), no_fast_path(), reads:
            return _Ran(model(inputs.clone()), None, reads.storages)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises on inputs it does not take
        return _Ran(None, error, reads.storages)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]  # it registers subclasses
    """Notes the memory that any operation is given, by whatever name or view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operation."""
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and (extent := Extent.of(value)) is not None:
                self.storages.add(extent.storage)
        return func(*args, **(kwargs or {}))


def _storages(model: nn.Module) -> dict[int, str]:
    """Returns the storages of parameters and buffers, each with the first name that lies in it."""
    tensors = list(chain(model.named_parameters(), model.named_buffers()))
    return {extent.storage: name for name, t in reversed(tensors) if (extent := Extent.of(t)) is not None}


def _placed_like(model: nn.Module, copied: nn.Module) -> nn.Module:
    """Moves a copy's tensors, in place, to the devices and dtypes of the model's."""
    theirs = dict(chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in chain(copied.named_parameters(), copied.named_buffers()):
        like = theirs.get(name)
        if like is None or like.shape != tensor.shape:
            raise UnprovenError(
                f"This {type(model).__name__} has changed since it was copied ({name!r} is not what it was), so "
                "that it cannot be shown that the copy does what it did. Make a new engine, or give it "
                "example_inputs= at once."
            )
        if (like.device, like.dtype) != (tensor.device, tensor.dtype):
            tensor.data = tensor.data.to(like.device, like.dtype)
    return copied


def _as_taken(inputs: Tensor, model: nn.Module) -> Tensor:
    """Returns inputs on the model's device, floating ones in its dtype."""
    parameters = list(model.parameters())
    place = parameters[0].device if parameters else inputs.device
    dtypes = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    return inputs.to(place, dtype if inputs.is_floating_point() else None)


def _require_own_weights(model: nn.Module, names: set[str], what: str) -> None:
    if names:
        order = [name for name, _ in chain(model.named_parameters(), model.named_buffers()) if name in names]
        shown = ", ".join(map(repr, order[:3])) + (f" and {len(order) - 3} more" if len(order) > 3 else "")
        raise GatingError(f"A copy of this {type(model).__name__} {what.format(shown)}. {ADVICE}")


def _require_equal(model: nn.Module, copied: _Ran, live: _Ran) -> None:
    name = type(model).__name__
    if copied.error is not None or live.error is not None:
        raised = next(str(error).splitlines() for error in (live.error, copied.error) if error is not None)
        which = "" if live.error is not None and copied.error is not None else " or its copy, not both,"
        raise UnprovenError(
            f"This {name}{which} fails on two of the inputs as it is: {(raised or ['no message'])[0].rstrip('.')}. So "
            "it cannot be shown that a copy of it responds. Give inputs as the model takes them."
        )
    got, expected = ([_dense(tensor) for tensor in tensors_in(run.output)] for run in (copied, live))
    shapes = [[tensor.shape for tensor in tensors] for tensors in (got, expected)]
    found: object = f"shapes {shapes[0]} for {shapes[1]}" if shapes[0] != shapes[1] else None
    for one, two in zip(got, expected, strict=False):
        found = found or (one.ndim and gap(one, two, TOLERANCES.get(two.dtype, ROUGH)))
    if found:
        raise UnprovenError(
            f"A copy of this {name} does not respond as the model itself: with weights set to zero in both, logits "
            f"differ by {found} on two examples. {ADVICE}"
        )


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
