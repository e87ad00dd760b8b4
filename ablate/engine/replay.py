"""Leave-one-out without running again what comes before the ablated weight: calls of modules are replayed.

A call of a module that ended before a weight is first read cannot depend on it: in a forward where only this weight
differs, its recorded output is returned instead of running it. What is replayed is found by watching, never guessed:
one forward is traced under a dispatch mode that sees every read of a weight's memory, whoever makes it (attention that
never calls the layer that owns the weight, bare parameters, views) and every write. Calls that write to memory older
than they are, return what they were given, or take or return what is no tensor run as ever; an output that later code
writes to is handed out as a copy. What watching cannot see (a module that leaves something in an attribute) is found by
running the unchanged model once per weight with its calls replayed: other bits, and that weight is run plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ablate.engine.loops import Loops
from ablate.engine.placing import Placed

NEVER = 2**62  # the first use of a weight that is not used
RECORDING = -1
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class Call:
    """One call of one module's forward. A time is the number of starts and ends of calls so far.

    Attributes:
      start, end: When.
      after: Position of the first call that starts after this one has ended.
      parent: Position of the call within which it happened, -1: none.
      replayable: Whether returning its output does all that running it does.
      written: Whether later code writes to its output in place.
      leaves, structure: Its output, flattened; empty where it is not kept.
      versions: Of the leaves, to see whether they were written to.
    """

    module: nn.Module
    start: int
    parent: int
    end: int = NEVER
    after: int = 0
    replayable: bool = True
    written: bool = False
    wanted: bool = True
    leaves: list[Any] = field(default_factory=list)
    structure: TreeSpec | None = None
    versions: list[int] = field(default_factory=list)

    def keep(self, output: Any) -> None:
        """Keeps the output of the call."""
        self.leaves, self.structure = tree_flatten(output)
        if self.written:
            self.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.versions = [_version(leaf) for leaf in self.leaves]

    def output(self) -> Any:
        """Returns the output again."""
        leaves = [leaf.clone() if self.written and isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.structure)  # type: ignore[arg-type]  # set with the leaves

    @property
    def intact(self) -> bool:
        """Whether nothing has written to the kept output."""
        return self.versions == [_version(leaf) for leaf in self.leaves]


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def rows_without_one(loops: Loops, components: Sequence[int], placed: Placed, result: Tensor, first: int) -> None:
    """Fills `result` (components, examples): the outputs without each component, one batch after the other."""
    gated_model = loops.gated_model
    rows: dict[int, list[int]] = {}  # by weight
    for row, component in enumerate(components):
        rows.setdefault(gated_model.weights.weight_of(component), []).append(row)
    weights = {weight: gated_model.weights.changed_with(weight) for weight in rows}
    replay = Replay(gated_model.unchecked, gated_model.model, weights)
    with nullcontext() if gated_model.compiled else replay.intercepted():
        for start, inputs, targets in placed.batches(loops.batch_size):
            inputs = loops.padded(inputs, loops.batch_size)
            gated_model.seen(inputs)
            recorded = not gated_model.compiled and replay.record(inputs)
            for weight in replay.order(weights) if recorded else weights:
                for row in rows[weight]:
                    with _without(loops, components[row]):
                        logits = replay.run(inputs, weight) if recorded else None
                        logits = gated_model.plain(inputs) if logits is None else logits
                    values = loops.measure(logits[: len(targets)], targets, first + start)
                    result[row, start : start + len(targets)] = values
                replay.release(weight)


@contextmanager
def _without(loops: Loops, component: int) -> Iterator[None]:
    """Switches one component off by changing its weight, and gives the weight back."""
    weights = loops.gated_model.weights
    keep = torch.ones(len(loops.gated_model.index), dtype=torch.bool, device=loops.gated_model.device)
    keep[component] = False
    try:
        weights.close_one(component, keep if loops.closed == 0.0 else loops.as_gates(keep))
        yield
    finally:
        weights.restore_one(component)


class ReplayDivergedError(RuntimeError):
    """A forward called other modules than the recorded one before anything had changed."""


class Replay:
    """Runs a model on one batch again and again, each time with another weight changed.

    Args:
      run: Runs the model on a batch.
      model: The model, owned by the caller; its modules' `forward` is wrapped while `intercepted`.
      weights: The groups of tensors of which one group at a time will be changed.

    Memory: the outputs of the calls that are replayed for some group; while tracing, those of all calls.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], model: nn.Module, weights: Mapping[int, Sequence[Tensor]]
    ) -> None:
        self._run = run
        self._model = model
        self._weights = weights
        self._plan: list[Call] = []
        self._calls: list[Call] = []
        self._open: list[int] = []
        self._clock = 0
        self._mode: _Accesses | None = None
        self._until = RECORDING  # or the first use of the changed weight: calls that end before it are replayed
        self._position = 0
        self._handed: list[Call] = []
        self._on = False
        self.first_use: dict[int, int] = {}
        self.refused: set[int] = set()  # groups that replaying does not serve

    @contextmanager
    def intercepted(self) -> Iterator[Replay]:
        """Wraps every module's forward for the time of a `with` block."""
        modules = [module for module in self._model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        own = {id(module): vars(module)["forward"] for module in modules if "forward" in vars(module)}
        try:
            for module in modules:
                vars(module)["forward"] = self._wrapped(module, module.forward)
            yield self
        finally:
            for module in modules:
                vars(module).pop("forward", None)
                if id(module) in own:
                    vars(module)["forward"] = own[id(module)]
            self._calls = []

    def record(self, inputs: Tensor) -> bool:
        """Runs the unchanged model on a batch and keeps what will be replayed; returns whether that can be done.

        The first batch, and any whose calls are not those of the one before, is traced first, and replayed unchanged
        for every group of weights.
        """
        if self._plan and self._recorded(inputs) is not None:
            return True
        self._trace(inputs)
        logits = self._recorded(inputs)
        if logits is None:
            return False
        self.refused.clear()
        for group in self.order(self._weights):
            again = self.run(inputs, group)
            if again is None or not torch.equal(again, logits):
                self.refused.add(group)
        return True

    def order(self, groups: Iterable[int]) -> list[int]:
        """Returns the groups by first use, last first.

        What a module keeps as an attribute is then still of the plain forward wherever its call is replayed.
        """
        return sorted(groups, key=lambda group: self.first_use[group], reverse=True)

    def run(self, inputs: Tensor, group: int) -> Tensor | None:
        """Returns the logits with a group of weights changed by the caller; None if they have to be run plainly."""
        if group in self.refused:
            return None
        self._until, self._position, self._handed = self.first_use[group], 0, []
        try:
            with self._watching():
                logits = self._run(inputs)
        except ReplayDivergedError:
            return None
        finally:
            self._until = RECORDING
        return logits if all(call.intact for call in self._handed) else None

    def release(self, group: int) -> None:
        """Lets go of what is replayed for no group that comes after this one in `order`."""
        for call in self._calls:
            if call.end > self.first_use[group]:
                call.leaves, call.versions, call.structure = [], [], None

    def _trace(self, inputs: Tensor) -> None:
        """Finds out which calls there are, when each group is first used, and what can be replayed."""
        self._plan = []
        mode = _Accesses(self._weights, lambda: self._clock, self._wrote)
        self._mode = mode
        try:
            self._forward(inputs, mode)
        finally:
            self._mode = None
        self.first_use = {group: mode.first.get(group, NEVER) for group in self._weights}
        for call in self._calls:
            call.written = any(mode.written.get(_memory(leaf), -1) >= call.end for leaf in call.leaves)
        for position, call in enumerate(self._calls):
            call.replayable &= not call.written or self._alone(position)
        times = set(self.first_use.values())
        for call in self._calls:
            call.wanted = call.replayable and any(call.end <= t < self._replayed_with(call) for t in times)
        self._plan = self._calls
        for call in self._plan:
            call.leaves, call.versions, call.structure = [], [], None

    def _recorded(self, inputs: Tensor) -> Tensor | None:
        """Runs the plain forward, keeps its outputs and returns its logits; None if it did not go as the trace did."""
        logits = self._forward(inputs, None)
        then = [(call.module, call.parent) for call in self._plan]
        now = [(call.module, call.parent) for call in self._calls]
        return logits if now == then and all(call.intact for call in self._calls) else None

    def _forward(self, inputs: Tensor, mode: _Accesses | None) -> Tensor:
        self._calls, self._open, self._clock = [], [], 0
        with self._watching(), nullcontext() if mode is None else mode:
            return self._run(inputs)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _alone(self, position: int) -> bool:
        """Returns whether nothing else that could be replayed beside it shares memory with the output of a call."""
        call = self._calls[position]
        mine = [_memory(leaf) for leaf in call.leaves if isinstance(leaf, Tensor)]
        if len(set(mine)) != len(mine):
            return False
        for other_position, other in enumerate(self._calls):
            nested = other_position < call.after if other_position >= position else other.after > position
            if other.replayable and not nested and set(mine) & {_memory(leaf) for leaf in other.leaves}:
                return False
        return True

    def _replayed_with(self, call: Call) -> int:
        """Returns when the innermost replayable call around a call ends: later weights replay that one instead."""
        parent = call.parent
        while parent >= 0:
            if self._calls[parent].replayable:
                return self._calls[parent].end
            parent = self._calls[parent].parent
        return NEVER + 1

    def _wrapped(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return forward(*args, **kwargs)
            if self._until == RECORDING:
                return self._note(module, forward, args, kwargs)
            return self._replay(module, forward, args, kwargs)

        return wrapper

    def _replay(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._position >= len(self._calls) or self._calls[self._position].start > self._until:
            self._on = False  # the changed weight was read: from here on everything runs
            return forward(*args, **kwargs)
        call = self._calls[self._position]
        if call.module is not module:
            raise ReplayDivergedError
        if call.wanted and call.end <= self._until:
            self._position = call.after
            self._handed.append(call)
            return call.output()
        self._position += 1
        return forward(*args, **kwargs)

    def _note(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        position = len(self._calls)
        call = Call(module, self._tick(), self._open[-1] if self._open else -1)
        if self._mode is None and position < len(self._plan):
            planned = self._plan[position]
            call.replayable, call.written, call.wanted = planned.replayable, planned.written, planned.wanted
        self._calls.append(call)
        self._open.append(position)
        given = tree_flatten((args, kwargs))[0] if self._mode else []
        output = forward(*args, **kwargs)
        self._open.pop()
        call.after, call.end = len(self._calls), self._tick()
        if self._mode is not None:
            now = tree_flatten((args, kwargs))[0]
            same = len(now) == len(given) and all(one is two for one, two in zip(now, given, strict=True))
            call.replayable &= same and _can_be_kept(output, given)
        if call.wanted:
            call.keep(output)
        return output

    def _wrote(self, born: int) -> None:
        """Notes a write to memory of some age: calls that are younger do more than return something."""
        for position in self._open:
            self._calls[position].replayable &= born >= self._calls[position].start

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _can_be_kept(output: Any, given: Sequence[Any]) -> bool:
    """Returns whether a call takes and returns nothing but tensors, and returns none that it was given."""
    leaves = tree_flatten(output)[0]
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in (*leaves, *given)):
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(tensor.is_inference() or tensor.layout is not torch.strided for tensor in tensors):
        return False
    return bool(tensors) and not {_memory(tensor) for tensor in tensors} & {_memory(leaf) for leaf in given}


def _memory(leaf: Any) -> int:
    """Returns where the memory of a tensor is; something of its own for what has none."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
        return -id(leaf)
    return leaf.untyped_storage().data_ptr() or -id(leaf)


class _Accesses(TorchDispatchMode):  # type: ignore[no-untyped-call]  # it registers subclasses
    """Notes when each group of tensors is first used, what memory is made when, and what is written to when."""

    def __init__(
        self, weights: Mapping[int, Sequence[Tensor]], clock: Callable[[], int], wrote: Callable[[int], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self._born: dict[int, int] = {}
        self._clock = clock
        self._wrote = wrote
        self._groups: dict[int, list[int]] = {}
        for group, tensors in weights.items():
            for tensor in tensors:
                self._groups.setdefault(_memory(tensor), []).append(group)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = {_memory(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        for memory in used:
            for group in self._groups.get(memory, ()):
                self.first.setdefault(group, self._clock())
        for position, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for leaf in tree_flatten(value)[0]:
                    self.written[_memory(leaf)] = self._clock()
                    self._wrote(self._born.get(_memory(leaf), 0))
        result = function(*args, **kwargs)
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor) and _memory(leaf) not in used:
                self._born[_memory(leaf)] = self._clock()
        return result
