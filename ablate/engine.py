"""The engine: outputs of a model under many keep-vectors, exact, without a copy of the model per keep-vector.

The engine owns one copy of the model (in eval mode, on its device, in its precision) and gates that copy's weights in
place; the user's model is never touched. Rows are independent: a row's outputs depend on the keep-vector, the examples
and the forward batch, not on which rows are computed with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ablate.components import ComponentIndex
from ablate.data import Examples
from ablate.errors import DataError, KeepError, LabelError, NonFiniteOutputError, UnknownNameError
from ablate.gating import WeightGates
from ablate.outputs import Output, get_output
from ablate.state import preserved_random_state

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
HOST_BUDGET = 2 * 2**30  # bytes of a Dataset held in memory at a time


class Engine:
    """Runs a model without some of its components.

    Args:
      model: Any module that maps inputs (batch, ...) to logits (batch, classes). Copied once, never changed.
      index: The components that can be switched off.
      output: A registered name (`margin`, `logit`, `loss`) or an instance of a subclass of `Output`.
      device: Where to run; None: where the model is.
      precision: `float32` or `float64`: weights and floating inputs are cast to it. No TF32 on CUDA.
      batch_size: Examples per forward. Another value changes rounding only.
      data_budget: Bytes of inputs held on the device at a time; what exceeds it is streamed in chunks, each run
        under all rows before the next. None: half of a CUDA device's free memory; on the CPU, 2 GiB of a `Dataset`
        (a tensor is used where it is).

    Raises:
      ModelMismatchError: The index does not describe the model.
      UnknownNameError: Unknown output or precision.
      DataError: The model cannot be copied, or is spread over several devices and `device` is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        index: ComponentIndex,
        output: str | Output = "margin",
        *,
        device: str | torch.device | None = None,
        precision: str = "float32",
        batch_size: int = 128,
        data_budget: int | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected at least 1.")
        index.check(model)
        self.index = index
        self.output = get_output(output)
        self.device = _device_of(model) if device is None else torch.device(device)
        self.precision = precision
        self.batch_size = batch_size
        self._dtype = PRECISIONS[precision]
        self._data_budget = data_budget
        self._model = _copy_of(model).eval().requires_grad_(False).to(self.device, self._dtype)
        self._gates = WeightGates(self._model, index)
        self._resident: tuple[Examples, Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return (
            f"<Engine: {type(self._model).__name__}, {len(self.index):,} components, {self.output.name}, "
            f"{self.precision} on {self.device}, {self.batch_size} examples per forward>"
        )

    def outputs(
        self,
        keep: npt.NDArray[np.bool_] | Tensor | Sequence[Sequence[bool]],
        inputs: Any,
        targets: Any = None,
    ) -> Tensor:
        """Returns the output of every example under every keep-vector. Mutates nothing.

        Args:
          keep: (rows, components) bool, True = kept.
          inputs: A tensor (examples, ...), a `Dataset` of (input, target), or `Examples` (then no targets).
          targets: Labels (examples,), integers.

        Returns:
          (rows, examples) in the engine's precision, on the CPU.

        Cost: rows x examples forwards, and one pass over the gated weights per row and chunk.

        Raises:
          KeepError: `keep` has another dtype or shape.
          LabelError: A target is none of the model's classes.
          NonFiniteOutputError: An output is NaN or infinite; names row and example.
        """
        examples = Examples.of(inputs, targets)
        rows = self._checked_keep(keep)
        result = torch.empty((len(rows), len(examples)), dtype=self._dtype, device=self.device)
        try:
            with preserved_random_state(), torch.no_grad(), self._exact_arithmetic():
                for first, chunk, labels in self._chunks(examples):
                    for r, keep_row in enumerate(rows):
                        self._gates.set(keep_row)
                        part = result[r, first : first + len(chunk)]
                        self._run(chunk, labels, part, check_from=first if r == 0 else None)
        finally:
            self._gates.restore()
        outputs = result.cpu()
        finite = torch.isfinite(outputs)
        if not bool(finite.all()):
            row, example = (int(i) for i in torch.nonzero(~finite)[0])
            raise NonFiniteOutputError(row, example, float(outputs[row, example]), examples.ids[example])
        return outputs

    def _run(self, inputs: Tensor, targets: Tensor, result: Tensor, check_from: int | None) -> None:
        """Fills `result` (examples,) with one keep-vector's outputs, batch by batch."""
        for start in range(0, len(inputs), self.batch_size):
            stop = min(len(inputs), start + self.batch_size)
            logits = self._model(inputs[start:stop].contiguous())  # equal data, equal bits, however it is laid out
            if check_from is not None:  # with the first keep-vector only: looking at labels waits for the device
                self._check(logits, targets[start:stop], check_from + start)
            values = self.output(logits, targets[start:stop])
            if tuple(values.shape) != (stop - start,):  # a scalar would be broadcast without a word
                raise DataError(
                    f"Output {self.output.name!r} returned shape {tuple(values.shape)} for {stop - start} examples, "
                    f"expected ({stop - start},): one number per example."
                )
            result[start:stop] = values

    def _checked_keep(self, keep: Any) -> Tensor:
        array = keep if isinstance(keep, Tensor) else np.asarray(keep)
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype != "bool":
            raise KeepError(
                f"keep has dtype {dtype}, expected bool (True = kept). Convert it yourself, e.g. keep > 0.5, so that "
                "its meaning is yours."
            )
        if array.ndim != 2 or array.shape[1] != len(self.index):
            advice = " For one keep-vector pass keep[None]." if array.ndim == 1 else ""
            raise KeepError(
                f"keep has shape {tuple(array.shape)}, expected (rows, {len(self.index)}): one column per component "
                f"of this index.{advice}"
            )
        rows = array if isinstance(array, Tensor) else torch.from_numpy(array.copy())  # torch takes no reversed views
        return rows.to(self.device)

    def _chunks(self, examples: Examples) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (first example, inputs, targets) on the device; the whole data set at once where it fits."""
        if self._resident is not None and self._resident[0] is examples:
            yield 0, self._resident[1], self._resident[2]
            return
        size = self._chunk_size(examples)
        for first, inputs, targets in examples.chunks(size):
            placed = self._place(inputs), targets.to(self.device)
            if size >= len(examples):
                self._resident = (examples, *placed)
            yield first, *placed

    def _chunk_size(self, examples: Examples) -> int:
        """Returns how many examples fit into the data budget: a multiple of the batch, so that batches never change."""
        budget = self._data_budget
        if budget is None and self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] // 2
        elif budget is None and examples.in_memory:
            return len(examples)
        elif budget is None:
            budget = HOST_BUDGET
        fitting = budget // max(1, examples.bytes_per_example)
        return len(examples) if fitting >= len(examples) else max(1, fitting // self.batch_size) * self.batch_size

    def _place(self, inputs: Tensor) -> Tensor:
        dtype = self._dtype if inputs.is_floating_point() else inputs.dtype
        return inputs.detach().to(device=self.device, dtype=dtype)

    def _check(self, logits: Any, targets: Tensor, first: int) -> None:
        """Raises unless the logits of a batch and the labels from example `first` on fit together."""
        batch = len(targets)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
            raise DataError(
                f"The model returned {shape} for {batch} examples, expected logits of shape ({batch}, classes) with "
                "at least 2 classes. Wrap the model so that it returns its logits."
            )
        outside = torch.nonzero((targets < 0) | (targets >= logits.shape[1])).flatten()
        if len(outside):
            label = int(targets[outside[0]])
            raise LabelError(
                f"The label of example {first + int(outside[0])} is {label}, expected a class from 0 to "
                f"{logits.shape[1] - 1}: the model has {logits.shape[1]} classes. Map the labels to them."
            )

    def _exact_arithmetic(self) -> Any:
        """Returns a context without TF32 where that exists: float32 means float32."""
        return _no_tf32() if self.device.type == "cuda" else nullcontext()


@contextmanager
def _no_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul.allow_tf32
    convolution = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def _copy_of(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the model's own attributes raise
        raise DataError(
            f"This {type(model).__name__} cannot be copied, and the engine works on a copy: {error}. If it keeps "
            "activations as attributes, delete them, or run it under torch.no_grad()."
        ) from error


def _device_of(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise DataError(
            f"The model is spread over {', '.join(sorted(map(str, devices)))}. Move it to one device, or pass device=."
        )
    return devices.pop() if devices else torch.device("cpu")
