"""Finding out how a model uses the weights that are to be gated, by running it on two examples.

Nothing is guessed from names or shapes: the model runs on a, on b and on both together, every use of a weight is
recorded, and the axis of a use's input or output that belongs to the examples is the one along which the joint run is
the two single runs put together. What cannot be established is reported, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.attention import NotImplementedInGatingError
from ablate.closeness import gap, same
from ablate.components import ComponentIndex
from ablate.errors import DataError, GatingError
from ablate.stack import Frame, Stack
from ablate.uses import Op, Rows, UseMode

RUNS_IF_RANDOM = 8  # of a model that draws random numbers: dropout on few logits often does the same twice
RTOL = 1e-7  # in float64: GEMM blocking differs between batches of one and of two


@dataclass(frozen=True)
class Layout:
    """Where the examples are in a tensor: along `axis`, each in consecutive places (`blocked`) or in turn."""

    axis: int
    blocked: bool = True

    def __str__(self) -> str:
        return f"examples along axis {self.axis}{'' if self.blocked else ', interleaved'}"


@dataclass
class Event:
    """One use of one watched weight in one run."""

    parameter: str
    op: Op
    rows: Rows
    frame: Frame
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Use:
    """One use of a weight: by which function, in which module, and the layouts of its input and output."""

    module: str
    op: Op
    rows: Rows
    in_layout: Layout | None
    out_layout: Layout | None
    by_forward: bool  # the module's own forward is this use and nothing else: input and output are the module's


@dataclass
class ProbeReport:
    """What a probe found out about a model."""

    uses: dict[str, list[Use]] = field(default_factory=dict)  # by parameter
    strange: dict[str, str] = field(default_factory=dict)  # parameter -> a use that cannot be gated
    folds: list[tuple[str, str]] = field(default_factory=list)  # (convolution, the batch norm that alone consumes it)
    head: str | None = None  # the linear layer whose output is the model's
    attention: bool = False  # uses scaled_dot_product_attention
    logits: Tensor | None = None  # of the two examples
    in_pairs: bool = False  # a batch of one example loses its axis (`.squeeze()`): it is run as two of the same


class Recorder(UseMode):
    """Records the uses of watched weights, what else touches them, and who consumes the output of convolutions."""

    def __init__(self, watched: Mapping[str, Tensor], stack: Stack) -> None:
        super().__init__(watched)
        self.stack = stack
        self.events: list[Event] = []
        self.strange: dict[str, str] = {}
        self.attention = False
        self.convolved: dict[int, Tensor] = {}  # kept alive, so that ids stay theirs
        self.consumers: dict[int, list[tuple[Any, Frame]]] = {}

    def before(self, name: str, op: Op, rows: Rows, x: Tensor) -> Tensor:
        """Notes who reads the input."""
        self._consume(op.name, (x,))
        return x

    def after(self, name: str, op: Op, rows: Rows, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Notes the use."""
        self.stack.top.uses += 1
        self.events.append(Event(name, op, rows, self.stack.top, x, y))
        if op.name == "conv2d":
            self.convolved[id(y)] = y
        return y

    def other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Notes what touches a watched weight in another way."""
        result = function(*args, **kwargs)
        flat = list(_tensors((args, kwargs)))
        if any(True for _ in _tensors(result)):
            for tensor in flat:
                if id(tensor) in self.watched:
                    name = _name_of(function)
                    where = self.stack.top.module or "the model itself"
                    self.strange.setdefault(self.watched[id(tensor)], f"{name} in {where!r}")
            self._consume(function, flat)
        if function is torch.conv2d:
            self.convolved[id(result)] = result
        self.attention |= function is F.scaled_dot_product_attention
        return result

    def _consume(self, function: Any, tensors: Any) -> None:
        for tensor in tensors:
            if id(tensor) in self.convolved:
                self.consumers.setdefault(id(tensor), []).append((function, self.stack.top))


def _name_of(function: Callable[..., Any]) -> str:
    """Returns what a user calls a function; an attribute like `weight.T` comes as the `__get__` of its descriptor."""
    name = getattr(function, "__name__", str(function))
    return f".{getattr(function.__self__, '__name__', '?')}" if name == "__get__" else name  # type: ignore[attr-defined]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Switches off the fused attention and encoder layers that read weights behind every module's back."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def probe(
    model: nn.Module, index: ComponentIndex, inputs: Tensor, check: Callable[[Any], None] = lambda logits: None
) -> ProbeReport:
    """Returns how `model` uses the weights of `index`; runs it four times on at most two examples.

    More often if it draws random numbers: two draws may agree by chance.

    Args:
      model: In eval mode, best in float64: layouts are found by comparing numbers.
      index: Its components.
      inputs: (2, ...), two examples, as the model takes them.
      check: Raises if what the model returned for them is not what the output needs.

    Raises:
      DataError: The model fails on them; names the module.
      GatingError: The model is random in eval mode, or its examples influence each other; names the module.
    """
    parameters = dict(model.named_parameters())
    watched = {port.parameter: parameters[port.parameter] for port in index.ports}
    inputs = telling(inputs)
    before = _random_state(inputs)
    joint, stack, logits = _record(model, watched, inputs)
    draws = not torch.equal(before, _random_state(inputs))
    check(logits)
    for _ in range(RUNS_IF_RANDOM if draws else 1):
        _, other_stack, repeated = _record(model, watched, inputs)
        _require_same(stack, other_stack, logits, repeated)
    twice, (first, stack_a, logits_a), (second, stack_b, logits_b) = _one_by_one(model, watched, inputs)
    _require_independent(model, (logits, logits_a, logits_b), (stack, stack_a, stack_b))

    report = ProbeReport(strange=joint.strange, attention=joint.attention, logits=logits, in_pairs=twice)
    find = find_layout_of_pairs if twice else find_layout
    same_run = len(joint.events) == len(first.events) == len(second.events)
    for i, event in enumerate(joint.events):
        single = (first.events[i], second.events[i]) if same_run else None
        report.uses.setdefault(event.parameter, []).append(_use(event, single, find))
    report.folds = list(_foldable(model, joint, stack, logits))
    report.head = next(
        (f.module for f in stack.frames if f.output is logits and isinstance(_module(model, f.module), nn.Linear)), None
    )
    return report


def telling(inputs: Tensor) -> Tensor:
    """Returns two inputs that tell how a model works: (2, ...), those given if they are finite and not the same.

    Of NaN or of twice the same image nothing can be learnt; what such an input does to the outputs is found later.
    """
    if inputs.is_floating_point():
        inputs = torch.nan_to_num(inputs, nan=0.0, posinf=0.0, neginf=0.0)
    if torch.equal(inputs[0], inputs[1]):
        other = inputs[1].flip(-1)
        if inputs.is_floating_point():  # a mirror image may be the same to a model
            other = other + torch.linspace(0, 1, other.numel(), dtype=other.dtype, device=other.device).view_as(other)
        inputs = torch.stack([inputs[0], other])
    return inputs


def _record(model: nn.Module, watched: Mapping[str, Tensor], inputs: Tensor) -> tuple[Recorder, Stack, Tensor]:
    stack = Stack(model)
    recorder = Recorder(watched, stack)
    version = inputs._version
    try:
        with torch.no_grad(), no_fast_path(), stack.watching(), recorder:
            logits = model(inputs)
    except NotImplementedInGatingError as error:
        raise GatingError(
            f"Module {stack.failed!r} is {error}, which is not taken apart. Leave it out with "
            f"exclude=[{stack.failed!r}]."
        ) from error
    except (torch.OutOfMemoryError, DataError):  # ours: what it returned holds no logits
        raise
    except Exception as error:  # whatever a model raises on inputs it does not take
        raise run_failed(model, stack.failed, inputs, error) from error
    if inputs._version != version:
        raise GatingError(
            f"This {type(model).__name__} changes its inputs in place (an operation like x.sub_() or "
            "relu(inplace=True) on what it was given): the next keep-vector would see other inputs. Let its forward "
            "work on a copy."
        )
    return recorder, stack, logits


def run_failed(model: nn.Module, module: str | None, inputs: Tensor, error: Exception) -> DataError:
    """Returns the error for a model that raised on some inputs: which module, what it got, what it expects."""
    where = "the model itself"
    if module is not None:
        found = _module(model, module)
        where = f"module {module!r}, {_described(found)}," if module else f"the {type(found).__name__} itself"
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else "no message"
    return DataError(
        f"The model fails on inputs of shape {tuple(inputs.shape)} and type "
        f"{str(inputs.dtype).removeprefix('torch.')}: "
        f"{where} raised {type(error).__name__}: {reason}. Give inputs as the model takes them: number of channels, "
        "image size, floating images or integer tokens."
    )


def _described(module: nn.Module) -> str:
    return f"a {repr(module) if not list(module.children()) else type(module).__name__}"


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _random_state(inputs: Tensor) -> Tensor:
    """Returns the state of the generator that a model draws from by default, where its inputs are."""
    return torch.cuda.get_rng_state(inputs.device) if inputs.is_cuda else torch.get_rng_state()


def _require_same(one: Stack, two: Stack, logits: Tensor, repeated: Tensor) -> None:
    """Raises unless two equal runs gave equal logits; names the first innermost module that differed."""
    if same(logits, repeated):
        return
    names = []
    for a, b in zip(one.frames, two.frames, strict=False):
        same_in = isinstance(a.input, Tensor) and isinstance(b.input, Tensor) and torch.equal(a.input, b.input)
        differs = isinstance(a.output, Tensor) and isinstance(b.output, Tensor) and not torch.equal(a.output, b.output)
        if same_in and differs:
            names.append(a.module)
    culprit = max(names, key=lambda name: name.count(".") + bool(name), default="")
    raise GatingError(
        f"The model is random in eval mode: the same two examples gave different logits. The randomness is in "
        f"{f'module {culprit!r}' if culprit else 'the model itself'}. Make it deterministic in eval mode "
        "(`if self.training:`); an ablation's effect cannot be told from noise otherwise."
    )


Run = tuple[Recorder, Stack, Tensor]


def _one_by_one(model: nn.Module, watched: Mapping[str, Tensor], inputs: Tensor) -> tuple[bool, Run, Run]:
    """Returns the runs on either example, each alone; or twice, and True, where a batch of one loses its axis.

    That is what `.squeeze()` does. What the model raises then is not its fault on any batch that it will run on.
    """
    try:
        alone = _record(model, watched, inputs[:1])
        if not isinstance(alone[2], Tensor) or alone[2].shape[:1] == (1,):
            return False, alone, _record(model, watched, inputs[1:2])
    except DataError:
        pass  # as a batch of one it may be no batch at all
    return True, _record(model, watched, inputs[[0, 0]]), _record(model, watched, inputs[[1, 1]])


def _require_independent(
    model: nn.Module, logits: tuple[Tensor, Tensor, Tensor], stacks: tuple[Stack, Stack, Stack]
) -> None:
    """Raises unless two examples give the logits that each gives alone, or twice; names the module that mixes them."""
    if _made_of(*logits):
        return
    names = [
        frames[0].module
        for frames in zip(*(stack.frames for stack in stacks), strict=False)
        if _made_of(*(frame.input for frame in frames)) and not _made_of(*(frame.output for frame in frames))
    ]
    culprit = max(names, key=lambda name: name.count(".") + bool(name), default="")
    module = _module(model, culprit)
    statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)
    where = f"module {culprit!r}, {_described(module)}," if culprit else "the model itself"
    found = f"Batch norm {culprit!r} uses the statistics of the batch. " if statistics else f"They mix in {where}. "
    advice = "Put batch norm into eval mode with its own statistics, or wrap" if statistics else "Wrap"
    raise GatingError(
        f"The examples of a batch influence each other: two examples together give other logits than one by one. "
        f"{found}{advice} the model so that each example's logits depend on that example alone."
    )


def _made_of(both: Any, a: Any, b: Any) -> bool:
    """Returns whether a result on two examples is, along its first axis, what each gives alone, or twice."""
    if not (isinstance(both, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor)) or both.ndim == 0:
        return False
    half = len(both) // 2
    if a.shape == b.shape == both.shape:
        single = torch.cat([a[:half], b[half:]])
    elif a.shape == b.shape and a.shape[1:] == both.shape[1:]:
        single = torch.cat([a, b])
    else:
        return False
    return single.shape == both.shape and gap(both, single, 1e-5) is None


def _use(event: Event, single: tuple[Event, Event] | None, find: Callable[..., Layout | None]) -> Use:
    frame = event.frame
    op = event.op
    by_forward = frame.uses == 1 and _same_values(frame.input, event.x) and _same_values(frame.output, event.y)
    in_layout = out_layout = None
    if single is not None:
        a, b = single
        if by_forward:
            in_layout = find(a.frame.input, b.frame.input, frame.input, op.channels)
            out_layout = find(a.frame.output, b.frame.output, frame.output, op.channels)
        else:
            in_layout = find(a.x, b.x, event.x, op.channels)
            out_layout = find(a.y, b.y, event.y, op.channels)
        # where one side's values are all equal (weights of zeros) or NaN, the other side tells
        in_layout, out_layout = in_layout or out_layout, out_layout or in_layout
    return Use(frame.module, op, event.rows, in_layout, out_layout, by_forward)


def _same_values(one: Any, two: Tensor) -> bool:
    """Returns whether two tensors are the same memory with the same last axis (one may be a view of the other)."""
    return (
        isinstance(one, Tensor)
        and (one is two or (one.is_contiguous() and two.is_contiguous()))
        and one.data_ptr() == two.data_ptr()
        and one.numel() == two.numel()
        and one.shape[-1] == two.shape[-1]
    )


def find_layout(a: Any, b: Any, both: Any, channels: int) -> Layout | None:
    """Returns how `both` is made of `a` and `b`, None if it is not; `channels` is the axis that cannot be theirs."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(both, Tensor)) or a.shape != b.shape:
        return None
    if a.ndim != both.ndim:
        return None
    for axis in range(both.ndim):
        if axis == channels % both.ndim:
            continue
        if both.shape != (*a.shape[:axis], 2 * a.shape[axis], *a.shape[axis + 1 :]):
            continue
        blocked = _close(both, torch.cat([a, b], axis))
        in_turn = a.shape[axis] > 1 and _close(both, torch.stack([a, b], axis + 1).flatten(axis, axis + 1))
        if blocked != in_turn:  # both where all values are equal or NaN: not to be told apart
            return Layout(axis, blocked)
    return None


def find_layout_of_pairs(a: Any, b: Any, both: Any, channels: int) -> Layout | None:
    """Returns what `find_layout` does, where `a` and `b` come of runs on two of the same example."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(both, Tensor)):
        return None
    if not a.shape == b.shape == both.shape:
        return None
    for axis in range(both.ndim):
        size = both.shape[axis]
        if axis == channels % both.ndim or size % 2:
            continue
        place = torch.arange(size, device=both.device).view(-1, *[1] * (both.ndim - 1 - axis))
        blocked = _close(both, torch.where(place < size // 2, a, b))
        in_turn = size > 2 and _close(both, torch.where(place % 2 == 0, a, b))
        if blocked != in_turn:
            return Layout(axis, blocked)
    return None


def _close(one: Tensor, two: Tensor) -> bool:
    equal = torch.equal(one, two)
    if equal or not two.is_floating_point():
        return equal
    # a mask's -inf or -1e9, which is the same in both, must not make room for differences between the others
    different = two[torch.isfinite(two) & (one != two)]
    scale = float(different.abs().max()) if different.numel() else 0.0
    rtol = RTOL if one.dtype == torch.float64 else 1e-4
    return torch.allclose(one, two, rtol=rtol, atol=rtol * scale, equal_nan=True)


def _foldable(model: nn.Module, recorder: Recorder, stack: Stack, logits: Tensor) -> Iterator[tuple[str, str]]:
    """Yields every convolution whose output one batch norm, called once, and nothing else reads."""
    calls: dict[str, int] = {}
    for frame in stack.frames:
        calls[frame.module] = calls.get(frame.module, 0) + 1
    for frame in stack.frames:
        if type(_module(model, frame.module)) is not nn.Conv2d or calls[frame.module] != 1:
            continue
        readers = recorder.consumers.get(id(frame.output), [])
        if len(readers) != 1 or frame.output is logits:
            continue
        function, reader = readers[0]
        norm = _module(model, reader.module)
        known = isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and not norm.training
        reads = function is F.batch_norm or function == "batch_norm"
        if known and reads and calls[reader.module] == 1:
            yield frame.module, reader.module
