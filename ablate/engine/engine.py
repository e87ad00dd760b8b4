"""The engine: outputs of a model under many keep-vectors, and their gradients, exact and as fast as a plain forward.

The engine owns one copy of the model and never touches the user's. Two ways of running it, equal to each other:
weight gating changes the copy's weights, one keep-vector per forward, and then runs the plain forward; activation
gating multiplies activations, every example under gates of its own, which is what gradients need. Rows are
independent: a row's outputs depend on the keep-vector, the examples and the forward batch, not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from ablate.ablation import Ablation, MeanAblation, get_ablation
from ablate.data.examples import Examples
from ablate.engine.checks import (
    check_logits,
    check_targets,
    checked_gates,
    checked_keep,
    finite_gradients,
    finite_outputs,
)
from ablate.engine.explain import explain
from ablate.engine.faithful import doubts
from ablate.engine.gated_model import ATTENTION, GatedModel, Speed, some_of_all
from ablate.engine.loops import Loops
from ablate.engine.memory import MemoryPlan
from ablate.engine.placing import Placed, two_inputs
from ablate.engine.replay import rows_without_one
from ablate.errors import DataError, GatingError, OutOfMemoryError, UnknownNameError
from ablate.gating.probe import distinct_pair
from ablate.index.apart import require_apart
from ablate.index.components import ComponentIndex
from ablate.logits import OutputKey, logits_alone
from ablate.models.copies import copy_of, device_of
from ablate.models.identity import ModelIdentity
from ablate.models.sharing import tie
from ablate.outputs import Output, get_output
from ablate.state import named_tensors, neutral_ambient, preserved_random_state

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MODES = ("auto", "weight", "activation")
BATCH_SIZE = 128

P = ParamSpec("P")
R = TypeVar("R")


def _neutrally(method: Callable[Concatenate[Engine, P], R]) -> Callable[Concatenate[Engine, P], R]:
    """Returns a method of an engine that runs as in a fresh process: what stands around the call changes no number."""

    @wraps(method)
    def call(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with neutral_ambient(engine.device):
            return method(engine, *args, **kwargs)

    return call


class Engine:
    """Runs a model without some of its components.

    Args:
      model: Any module that maps inputs (batch, ...) to logits. Copied once, never changed.
      index: The components that can be switched off.
      output: A registered name (`margin`, `logit`, `loss`, ...) or an instance of a subclass of `Output`.
      output_key: Where in what the model returns the logits are, if it is no tensor: a key, attribute or position.
        None: what is called `logits`, else the only tensor that is returned; see `ablate.logits_of`.
      device: Where to run; None: where the model is.
      precision: `float32`, `float64` or `bfloat16`: weights and floating inputs are cast to it. No TF32 on CUDA. In
        bfloat16 the layer that makes the logits stays in float32, as do the outputs.
      ablation: What ablated components leave behind: "zero", `MeanAblation(reference)`, `ScaleAblation(factor)`.
      mode: How `outputs` runs: "weight", "activation", or "auto": weight gating, but activation gating on CUDA where
        there are so few examples that several keep-vectors fit into one forward.
      batch_size: Examples per forward. Another value changes rounding only. None: 128 on the CPU; on CUDA the smallest
        of 64 to 1,024 at which an example costs hardly more than at the best, by timing.
      data_budget: Bytes of inputs held on the device at a time; what exceeds it is streamed in chunks, each run
        under all rows before the next. None: half of a CUDA device's free memory; on the CPU, 2 GiB of inputs that
        have to be read or converted (a tensor that needs neither is used where it is).
      memory_budget: Bytes of device memory that a call may take: batches are made as small as it needs (see `plan`).
      speed: Folding, layout, compilation: see `Speed`.
      example_inputs: At least one input (examples, ...), or Examples, to check the model with at construction;
        None: the first call checks it with its own.
      self_check: Compare literal zeroing, weight gating and activation gating on two examples, and refuse a model
        on which they differ.

    Raises:
      ModelMismatchError: The index does not describe the model.
      UnknownNameError: Unknown output, precision, mode or ablation.
      DataError: The model cannot be copied, or fails on the inputs, or is spread over several devices and `device`
        is not given.
      GatingError: The model is random in eval mode, mixes the examples of a batch, or fails the self-check.
    """

    def __init__(
        self,
        model: nn.Module,
        index: ComponentIndex,
        output: str | Output = "margin",
        *,
        output_key: OutputKey = None,
        device: str | torch.device | None = None,
        precision: str = "float32",
        ablation: str | Ablation = "zero",
        mode: str = "auto",
        batch_size: int | None = None,
        data_budget: int | None = None,
        memory_budget: int | None = None,
        speed: Speed | None = None,
        example_inputs: Tensor | Examples | None = None,
        self_check: bool = True,
    ) -> None:
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        if mode not in MODES:
            raise UnknownNameError("mode", mode, MODES)
        attention = None if speed is None else speed.attention
        if attention is not None and attention not in ATTENTION:
            raise UnknownNameError("attention backend", attention, ATTENTION)
        if batch_size is not None and batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected at least 1.")
        index.check(model)
        self.index = index
        self.output = get_output(output)
        self.device = device_of(model) if device is None else torch.device(device)
        self.precision = precision
        self.ablation = get_ablation(ablation)
        self.mode = mode
        self.batch_size = BATCH_SIZE if batch_size is None else batch_size
        self.speed = speed or Speed()
        self._batch_size = batch_size
        self._data_budget = data_budget
        self._memory_budget = memory_budget
        self._self_check = self_check
        self._name = type(model).__name__
        self.output_key = output_key
        _require_real(model, index)
        require_apart(model, index)
        self._model = copy_of(model).eval().requires_grad_(False)
        self._tensors = named_tensors(self._model)  # as the model names them: tied ones lose a name
        tie(self._model)
        self._live = model  # until it is proven that the copy does what the model does
        self._identity: ModelIdentity | None = None
        self._loops: Loops | None = None
        self._placed: Placed | None = None
        if example_inputs is not None:
            given = example_inputs if isinstance(example_inputs, Examples) else _unlabelled(example_inputs)
            with self._running():
                self._ready(given)

    def __repr__(self) -> str:
        return (
            f"<Engine: {self._name}, {len(self.index):,} components, {self.output.name}, "
            f"{self.precision} on {self.device}, {self.batch_size} examples per forward>"
        )

    @_neutrally
    def outputs(
        self, keep: npt.NDArray[np.bool_] | Tensor | Sequence[Sequence[bool]], inputs: Any, targets: Any = None
    ) -> Tensor:
        """Returns the output of every example under every keep-vector. Mutates nothing.

        Args:
          keep: (rows, components) bool, True = kept.
          inputs: A tensor (examples, ...), a `Dataset` of (input, target), or `Examples` (then no targets).
          targets: Labels (examples,), integers; for language models (examples, tokens). None where the output needs
            none (`value`).

        Returns:
          (rows, examples) on the CPU, float32, or float64 in that precision.

        Cost: rows x examples forwards; with weight gating one pass over the changed weights per row and chunk.

        Raises:
          KeepError: `keep` has another dtype or shape.
          LabelError: A target is none of the model's classes.
          NonFiniteOutputError: An output is NaN or infinite; names row and example.
          OutOfMemoryError: The device's memory did not suffice; says what to lower.
        """
        rows = checked_keep(keep, len(self.index)).to(self.device)
        return self._rows(rows, self._examples(inputs, targets))

    @_neutrally
    def gated_outputs(self, gates: npt.NDArray[Any] | Tensor, inputs: Any, targets: Any = None) -> Tensor:
        """Returns the output of every example under every vector of gates, of any real values. Mutates nothing.

        Args:
          gates: (rows, components) floating: 1 = kept, 0 = ablated, between = attenuated.
          inputs, targets: As for `outputs`.

        Returns:
          (rows, examples), as `outputs`; errors and cost as there.
        """
        rows = checked_gates(gates, len(self.index))
        return self._rows(rows, self._examples(inputs, targets))

    @_neutrally
    def example_outputs(self, gates: npt.NDArray[Any] | Tensor, inputs: Any, targets: Any = None) -> Tensor:
        """Returns the output of each example under gates of its own, (examples,). Mutates nothing.

        Args:
          gates: (examples, components) floating.
          inputs, targets: As for `outputs`.

        Cost: one forward per example. Errors: as `gate_gradients`.
        """
        examples = self._examples(inputs, targets)
        return self._per_example(checked_gates(gates, len(self.index), len(examples)), examples, gradients=False)[0]

    @_neutrally
    def gate_gradients(
        self, gates: npt.NDArray[Any] | Tensor, inputs: Any, targets: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Returns each example's output under its own gates, and its gradient with respect to them. Mutates nothing.

        Args:
          gates: (examples, components) floating; ones give the gradient at the unablated model.
          inputs, targets: As for `outputs`.

        Returns:
          (examples,) and (examples, components), on the CPU, float32, or float64 in that precision.

        Cost: one forward and one backward per example, without gradients of parameters.

        Raises:
          KeepError: `gates` has another dtype or shape.
          GatingError: A module cannot be gated per example; names it.
          NonFiniteOutputError: An output or a gradient is NaN or infinite.
          OutOfMemoryError: The device's memory did not suffice; says what to lower.
        """
        examples = self._examples(inputs, targets)
        return self._per_example(checked_gates(gates, len(self.index), len(examples)), examples, gradients=True)

    @_neutrally
    def leave_one_out(self, inputs: Any, targets: Any = None, components: Sequence[int] | None = None) -> Tensor:
        """Returns the output of every example without each of these components, by default all. Mutates nothing.

        The bits of `outputs` by weight gating, for keep-vectors with one component off.

        Returns:
          (components, examples), in the order given; dtype as `outputs`.

        Cost: a forward of each batch, then for every component what comes after its weight is first read; for the first
          batch a forward more, and that again for every weight.
        Memory: the outputs of modules for one batch beside `outputs`; a `memory_budget` does not count them.
        Errors: as `outputs`, with the position in `components` for the row; IndexError for a component that is none.
        """
        examples = self._examples(inputs, targets)
        chosen = [self.index[c].id for c in (range(len(self.index)) if components is None else components)]
        with self.session(examples) as (loops, chunks):
            result = torch.empty((len(chosen), len(examples)), dtype=loops.dtype, device=self.device)
            for first, placed in chunks:
                rows_without_one(loops, chosen, placed, result[:, first : first + len(placed)], first)
        return finite_outputs(result.cpu(), examples)

    @_neutrally
    def check(self, inputs: Any, targets: Any = None) -> None:
        """Checks the model with the first two of these examples, once; mutates nothing. The first call does so, too.

        Raises:
          DataError: The model fails on them, or targets are not what the output needs.
          GatingError: The model is random in eval mode, mixes the examples of a batch, or fails the self-check.
        """
        examples = self._examples(inputs, targets)
        with self._running():
            self._ready(examples)

    def explain(self) -> pd.DataFrame:
        """Returns how each module is gated and why, one row per port; run something first, or give example_inputs."""
        if self._gated_model is None:
            raise GatingError("Nothing is known yet: give the engine example_inputs=, or call outputs() first.")
        return explain(self._gated_model)

    @_neutrally
    def identity(self, inputs: Any, targets: Any = None) -> ModelIdentity:
        """Returns what the model is: hashes of its tensors, its code. Checks it with two of these examples, once."""
        examples = self._examples(inputs, targets)
        with self._running():
            self._ready(examples)
        return self._identity  # type: ignore[return-value]  # made with the loops

    @_neutrally
    def plan(self, inputs: Any, targets: Any = None) -> MemoryPlan:
        """Returns how much device memory calls on these examples take, measured on a few of them. Mutates nothing.

        Peaks are those of calls, not of making the engine, which for a moment holds the model in float64 beside them.
        """
        examples = self._examples(inputs, targets)
        with self._running():
            return (loops := self._ready(examples)).plan(*self._few(examples, loops))

    @contextmanager
    def session(self, examples: Examples) -> Iterator[tuple[Loops, Iterator[tuple[int, Placed]]]]:
        """Gives what runs the model, and the examples on its device in chunks: for other loops of this package."""
        with self._running():
            loops = self._ready(examples)
            yield loops, self._chunks(examples, loops.batch_size)

    def _examples(self, inputs: Any, targets: Any) -> Examples:
        examples = Examples.of(inputs, targets, labelled=self.output.needs_labels)
        check_targets(examples, self.output)
        return examples

    def _rows(self, rows: Tensor, examples: Examples) -> Tensor:
        """Returns the outputs of rows (rows, components), bool or real, on all examples."""
        with self._running():
            loops = self._ready(examples)
            result = torch.empty((len(rows), len(examples)), dtype=loops.dtype, device=self.device)
            stackable = self.device.type == "cuda" and 2 * len(examples) <= loops.batch_size
            by_gates = stackable and self.mode == "auto" and not loops.gated_model.activation.problems
            by_gates |= self.mode == "activation"
            try:
                for first, placed in self._chunks(examples, loops.batch_size):
                    part = result[:, first : first + len(placed)]
                    if by_gates:
                        loops.rows_by_gates(rows, placed, part, first, len(examples))
                    else:
                        loops.rows_by_weights(rows, placed, part, first)
            finally:
                loops.gated_model.weights.restore()
        return finite_outputs(result.cpu(), examples)

    def _per_example(self, gates: Tensor, examples: Examples, gradients: bool) -> tuple[Tensor, Tensor]:
        """Returns outputs (examples,) and, if asked, gradients (examples, components), else an empty tensor."""
        with self._running():
            loops = self._ready(examples)
            place = self._place_for(gates.numel() * (2 if gradients else 1) * loops.dtype.itemsize)
            gates = gates.to(place)
            result = torch.empty(len(examples), dtype=loops.dtype, device=place)
            shape = (len(examples) if gradients else 0, len(self.index))
            slopes = torch.empty(shape, dtype=loops.dtype, device=place)
            size = loops.gradient_batch_size if gradients else loops.batch_size
            for first, placed in self._chunks(examples, size):
                span = slice(first, first + len(placed))
                loops.per_example(gates[span], placed, result[span], slopes[span] if gradients else None, first)
        result, slopes = result.cpu(), slopes.cpu()
        finite_outputs(result[None], examples)
        return result, finite_gradients(slopes, examples)

    def _place_for(self, size: int) -> torch.device:
        """Returns where so many bytes of gates and gradients live during a call: on a CUDA device if it has room."""
        if self.device.type != "cuda" or size > torch.cuda.mem_get_info(self.device)[0] // 8:
            return torch.device("cpu")
        return self.device

    def _ready(self, examples: Examples) -> Loops:
        """Returns what runs the model; made, and the model checked, with the first examples that come."""
        if self._loops is not None:
            self._loops.checked.clear()
            return self._loops
        inputs = two_inputs(examples, self.device)
        doubt = doubts(self._live, self._model, some_of_all(self.index), distinct_pair(inputs))
        with logits_alone(self._model, self.output_key):
            gated_model = GatedModel(
                self._model,
                self.index,
                inputs,
                device=self.device,
                dtype=PRECISIONS[self.precision],
                ablation=self.ablation,
                speed=self.speed,
                check=lambda logits: check_logits(logits, 2, self.output),
                reference=self._reference if isinstance(self.ablation, MeanAblation) else None,
                self_check=self._self_check,
            )
        if doubt is not None:  # not raised before: the gated model knows random models by name
            raise doubt
        self._identity = ModelIdentity.of(
            self._model, self._tensors, gated_model.report.rewritten, gated_model.report.code
        )
        self._tensors = {}
        measured = self._batch_size is None and self.device.type == "cuda"
        loops = Loops(gated_model, self.output, self.ablation.closed, self.batch_size, self.batch_size)
        loops.fit(self._memory_budget, *self._few(examples, loops), measured)
        self.batch_size = loops.batch_size
        self._loops = loops
        self._model = self._live = nn.Identity()  # the gated model has all that is needed
        return loops

    def _few(self, examples: Examples, loops: Loops) -> tuple[Tensor, Tensor]:
        """Returns up to four examples as the gated model takes them."""
        few = examples.inputs(0, min(4, len(examples)))
        placed = Placed(
            examples,
            examples.prepared(few.to(self.device), loops.gated_model.dtype),
            examples.targets[: len(few)].to(self.device),
            loops.gated_model.dtype,
            loops.gated_model.layout,
        )
        _, inputs, targets = next(placed.batches(4))
        return inputs, targets

    def _reference(self, dtype: torch.dtype) -> Iterator[Tensor]:
        if isinstance(self.ablation, MeanAblation):
            reference = self.ablation.reference
            for _, inputs, _ in reference.chunks(self.batch_size):
                yield reference.prepared(inputs.to(self.device), dtype)

    @property
    def _gated_model(self) -> GatedModel | None:
        return None if self._loops is None else self._loops.gated_model

    def _chunks(self, examples: Examples, batch_size: int | None = None) -> Iterator[tuple[int, Placed]]:
        """Yields (first example, inputs and targets on the device); the whole data set at once where it fits."""
        if self._placed is not None and self._placed.examples is examples:
            yield 0, self._placed
            return
        self._placed = None  # before others take its memory
        loops = self._ready(examples)
        gated_model = loops.gated_model
        budget = loops.data_room if self._data_budget is None else self._data_budget
        for first, placed in Placed.chunks(
            examples, self.device, gated_model.dtype, gated_model.layout, batch_size or self.batch_size, budget
        ):
            if len(placed) == len(examples):
                self._placed = placed
            yield first, placed

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Everything a call needs around it."""
        try:
            with (
                neutral_ambient(self.device),
                preserved_random_state(),
                torch.no_grad(),
            ):
                yield
        except torch.OutOfMemoryError as error:
            lower = f"batch_size (now {self.batch_size}, try {max(1, self.batch_size // 2)})"
            precision = ", or use precision='bfloat16'" if self.precision != "bfloat16" else ""
            raise OutOfMemoryError(
                f"The memory of {self.device} did not suffice for {self.batch_size} examples per forward. Lower "
                f"{lower} or data_budget{precision}. Nothing of this call was kept; earlier results stay."
            ) from error


def _require_real(model: nn.Module, index: ComponentIndex) -> None:
    parameters = dict(model.named_parameters())
    for port in index.ports:
        if parameters[port.parameter].is_complex():
            raise GatingError(
                f"The weight {port.parameter!r} of module {port.module!r} is complex, and gates are real: outputs "
                f"under them were never checked. Leave the module out with exclude=[{port.module!r}]; complex numbers "
                "elsewhere in the model stay as they are."
            )


def _unlabelled(inputs: Tensor) -> Examples:
    return Examples(inputs, torch.zeros(len(inputs), dtype=torch.int64))
