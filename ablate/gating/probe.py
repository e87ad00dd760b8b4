"""Finding out how a model uses the weights that are to be gated, by running it on two examples.

Nothing is guessed from names or shapes: the model runs on a, on b, on both together and on b, a, b, every use of a
weight is recorded, and the axis of a use's input or output that belongs to the examples is the one along which the
joint runs are the single runs put together. Whether that holds for other examples, too, the operations of the last run
tell (see `routing`). What cannot be established is reported, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.errors import DataError, GatingError
from ablate.gating.attention import NotImplementedInGatingError, no_fast_path
from ablate.gating.closeness import gap, same
from ablate.gating.layouts import ExampleLayout, layout_of_all
from ablate.gating.recorder import Event, Recorder
from ablate.gating.routing import Routes, Steps
from ablate.gating.uses import Op, WeightRows
from ablate.index.components import ComponentIndex
from ablate.models.buffers import written_buffers
from ablate.models.network import describe_modules
from ablate.models.stack import Stack

RUNS_IF_RANDOM = 8  # of a model that draws random numbers: dropout on few logits often does the same twice


@dataclass(frozen=True)
class Use:
    """One use of a weight: by which function, in which module, and the layouts of its input and output.

    Attributes:
      by_forward: The module's own forward is this use and nothing else: input and output are the module's.
      moved: Why the layouts hold for the examples that were looked at only, None if they hold for all of their shape.
    """

    module: str
    op: Op
    rows: WeightRows
    in_layout: ExampleLayout | None
    out_layout: ExampleLayout | None
    by_forward: bool
    moved: str | None = None


@dataclass
class ProbeReport:
    """What a probe found out about a model."""

    uses: dict[str, list[Use]] = field(default_factory=dict)  # by parameter
    strange: dict[str, str] = field(default_factory=dict)  # parameter -> a use that cannot be gated
    folds: list[tuple[str, str]] = field(default_factory=list)  # (convolution, the batch norm that alone consumes it)
    head: str | None = None  # the linear layer whose output is the model's
    attention: bool = False  # uses scaled_dot_product_attention
    cuts: dict[str, str] = field(default_factory=dict)  # what may cut gradients -> in which module
    logits: Tensor | None = None  # of the two examples
    in_pairs: bool = False  # a batch of one example loses its axis (`.squeeze()`): it is run as two of the same
    code: dict[str, Any] = field(default_factory=dict)  # types and settings of modules, calls
    rewritten: tuple[str, ...] = ()  # buffers that a forward writes


def probe(
    model: nn.Module, index: ComponentIndex, inputs: Tensor, check: Callable[[Any], None] = lambda logits: None
) -> ProbeReport:
    """Returns how `model` uses the weights of `index`; runs it four times on at most two examples, once on three.

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
    watched = watched_weights(model, index)
    inputs = distinct_pair(inputs)
    runs = checked_runs(model, watched, inputs, check)
    (joint, stack, logits), (first, _, _), (second, _, _), twice = runs.both, runs.first, runs.second, runs.twice
    report = ProbeReport(strange=joint.strange, attention=joint.attention, logits=logits, in_pairs=twice)
    report.rewritten, report.code = runs.rewritten, runs.code
    report.uses, report.cuts = _uses(model, watched, inputs, runs.steps, joint, (first, second), twice)
    report.folds = list(_foldable(model, joint, stack, logits))
    report.head = next(
        (f.module for f in stack.frames if f.output is logits and isinstance(_module(model, f.module), nn.Linear)), None
    )
    return report


Run = tuple[Recorder, Stack, Tensor]


@dataclass(frozen=True)
class CheckedRuns:
    """Runs on two examples: on both, and on either alone (or, where a batch of one loses its axis, `twice`).

    `steps` are those of the last run on both; `rewritten` names the buffers that the first of them wrote, `code` says
    what the model's modules are, and its calls in the last one.
    """

    both: Run
    first: Run
    second: Run
    twice: bool
    steps: Steps
    rewritten: tuple[str, ...]
    code: dict[str, Any]


def checked_runs(
    model: nn.Module,
    watched: Mapping[str, Tensor],
    inputs: Tensor,
    check: Callable[[Any], None] = lambda logits: None,
    tolerance: float = 1e-5,
) -> CheckedRuns:
    """Returns the runs of a model on two examples, recorded, after checking that they agree; raises as `probe`.

    Args:
      model, check: As for `probe`.
      watched: The weights whose uses are recorded, by name.
      inputs: (2, ...), see `distinct_pair`.
      tolerance: How far logits may differ between two examples together and alone, as a share of their size.
    """
    before = _random_state(inputs)
    modules = describe_modules(model)
    with written_buffers(model) as rewritten:
        joint, stack, logits = _record(model, watched, inputs)
    draws = not torch.equal(before, _random_state(inputs))
    check(logits)
    _require_real(logits)
    for _ in range(RUNS_IF_RANDOM if draws else 1):
        steps = Steps()  # not of the first run, in which some models fill caches
        again, other_stack, repeated = _record(model, watched, inputs, steps)
        _require_same(stack, other_stack, logits, repeated, () if draws else rewritten)
    twice, first, second = _one_by_one(model, watched, inputs)
    three = (joint, stack, logits), first, second
    _require_independent(model, [run[2] for run in three], [run[1] for run in three], tolerance)
    code = {**_lasting(modules, describe_modules(model)), **again.calls.describe()}
    return CheckedRuns(*three, twice, steps, tuple(rewritten), code)


def look_again(model: nn.Module, index: ComponentIndex, inputs: Tensor) -> ProbeReport:
    """Returns how a model that was probed uses its weights on two inputs of another shape; uses and oddities only."""
    watched = watched_weights(model, index)
    inputs = distinct_pair(inputs)
    twice, (first, _, _), (second, _, _) = _one_by_one(model, watched, inputs)
    steps = Steps()
    joint, _, _ = _record(model, watched, inputs, steps)
    uses, cuts = _uses(model, watched, inputs, steps, joint, (first, second), twice)
    return ProbeReport(uses=uses, strange=joint.strange, cuts=cuts)


def watched_weights(model: nn.Module, index: ComponentIndex) -> dict[str, Tensor]:
    """Returns the weights of an index by name."""
    parameters = dict(model.named_parameters())
    return {port.parameter: parameters[port.parameter] for port in index.ports}


def _lasting(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Returns modules without the settings that a forward changed: counters, lengths of caches."""
    settings = {
        module: {name: value for name, value in found.items() if after["settings"].get(module, {}).get(name) == value}
        for module, found in before["settings"].items()
    }
    return {**before, "settings": settings}


def distinct_pair(inputs: Tensor) -> Tensor:
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


def _uses(
    model: nn.Module,
    watched: Mapping[str, Tensor],
    inputs: Tensor,
    steps: Steps,
    joint: Recorder,
    single: tuple[Recorder, Recorder],
    twice: bool,
) -> tuple[dict[str, list[Use]], dict[str, str]]:
    """Returns the uses of every weight, and what may cut gradients; runs the model on three examples: b, a, b."""
    three, lost = _three(model, watched, inputs[[1, 0, 1]], steps)
    uses: dict[str, list[Use]] = {}
    alike = len({len(recorder.events) for recorder in (joint, *single)}) == 1
    for i, event in enumerate(joint.events):
        singles = (single[0].events[i], single[1].events[i]) if alike else None
        third = three.events[i] if i < len(three.events) else None
        same = third is not None and (third.parameter, third.op) == (event.parameter, event.op)
        uses.setdefault(event.parameter, []).append(_use(event, singles, third if same else None, lost, twice))
    return uses, {} if three.routes is None else three.routes.cuts


def _three(
    model: nn.Module, watched: Mapping[str, Tensor], inputs: Tensor, steps: Steps
) -> tuple[Recorder, str | None]:
    """Returns the record of a run of three examples, and why it could not be followed to its end."""
    stack = Stack(model)
    routes = Routes(inputs, steps.steps, lambda: stack.top.module)
    recorder = Recorder(watched, stack, routes)
    try:
        with torch.no_grad(), no_fast_path(), stack.watching(), recorder, routes:
            model(inputs)
    except Exception as error:  # it took two and will be asked for three only where three are given
        return recorder, f"the model fails on three examples ({type(error).__name__})"
    return recorder, None


def _record(
    model: nn.Module, watched: Mapping[str, Tensor], inputs: Tensor, steps: Steps | None = None, touches: bool = False
) -> tuple[Recorder, Stack, Tensor]:
    stack = Stack(model)
    recorder = Recorder(watched, stack, touches=touches)
    version = inputs._version
    try:
        modes = (recorder, recorder.calls, steps or nullcontext())
        with ExitStack() as within:
            for context in (torch.no_grad(), no_fast_path(), stack.watching(), *modes):
                within.enter_context(context)
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


def _require_real(logits: Tensor) -> None:
    if logits.is_complex():
        raise DataError(
            f"The model returned complex logits ({str(logits.dtype).removeprefix('torch.')}), expected real ones. Wrap "
            "it so that it returns real numbers, e.g. logits.abs() or logits.real."
        )


def _require_same(one: Stack, two: Stack, logits: Tensor, repeated: Tensor, rewritten: Sequence[str]) -> None:
    """Raises unless two equal runs gave equal logits; names what was rewritten, or the first module that differed."""
    if same(logits, repeated):
        return
    if rewritten:
        raise GatingError(
            f"The model changes its buffer {rewritten[0]!r} in eval mode, at every forward, so that its outputs depend "
            "on how often it ran: the same two examples gave different logits. Let it change buffers in training only "
            "(`if self.training:`)."
        )
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


def _one_by_one(model: nn.Module, watched: Mapping[str, Tensor], inputs: Tensor) -> tuple[bool, Run, Run]:
    """Returns the runs on either example, each alone; or twice, and True, where a batch of one loses its axis.

    That is what `.squeeze()` does. What the model raises then is not its fault on any batch that it will run on.
    """
    try:
        alone = _record(model, watched, inputs[:1], touches=True)
        if not isinstance(alone[2], Tensor) or alone[2].shape[:1] == (1,):
            return False, alone, _record(model, watched, inputs[1:2])
    except DataError:
        pass  # as a batch of one it may be no batch at all
    return True, _record(model, watched, inputs[[0, 0]], touches=True), _record(model, watched, inputs[[1, 1]])


def _require_independent(model: nn.Module, logits: Sequence[Tensor], stacks: Sequence[Stack], tolerance: float) -> None:
    """Raises unless two examples give the logits that each gives alone, or twice; names the module that mixes them."""
    if _made_of(tolerance, *logits):
        return
    names = [
        frames[0].module
        for frames in zip(*(stack.frames for stack in stacks), strict=False)
        if _made_of(tolerance, *(frame.input for frame in frames))
        and not _made_of(tolerance, *(frame.output for frame in frames))
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


def _made_of(tolerance: float, both: Any, a: Any, b: Any) -> bool:
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
    return single.shape == both.shape and gap(both, single, tolerance) is None


def _use(event: Event, single: tuple[Event, Event] | None, three: Event | None, lost: str | None, twice: bool) -> Use:
    frame = event.frame
    same = _same_values(frame.input, event.x) and _same_values(frame.output, event.y)
    by_forward = frame.uses == 1 and same and single is not None and single[0].untouched
    in_layout = out_layout = None
    if single is not None and three is not None:
        runs = (*single, event, three)
        inputs, outputs = ([r.frame.input for r in runs], [r.frame.output for r in runs])
        if not by_forward:
            inputs, outputs = ([r.x for r in runs], [r.y for r in runs])
        in_layout = layout_of_all(inputs, event.op.channels, twice)
        out_layout = layout_of_all(outputs, event.op.channels, twice)
        # where one side's values are all equal (weights of zeros) or NaN, the other side tells
        in_layout, out_layout = in_layout or out_layout, out_layout or in_layout
    moved = lost or (three.moved if three is not None else "it is not used on three examples")
    return Use(frame.module, event.op, event.rows, in_layout, out_layout, by_forward, moved)


def _same_values(one: Any, two: Tensor) -> bool:
    """Returns whether two tensors are the same memory with the same last axis (one may be a view of the other)."""
    return (
        isinstance(one, Tensor)
        and (one is two or (one.is_contiguous() and two.is_contiguous()))
        and one.data_ptr() == two.data_ptr()
        and one.numel() == two.numel()
        and one.shape[-1] == two.shape[-1]
    )


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
