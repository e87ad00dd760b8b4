"""Examples on the engine's device: all of them where they fit, else in chunks; prepared once where that is cheap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.data.examples import Examples
from ablate.engine.checks import check_device

HOST_BUDGET = 2 * 2**30  # bytes of inputs that are read or converted, held in memory at a time


@dataclass
class Placed:
    """Some examples on the device: inputs as the model takes them, or uint8 pixels that become so batch by batch."""

    examples: Examples
    inputs: Tensor
    targets: Tensor
    dtype: torch.dtype
    layout: torch.memory_format

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (first example, inputs ready for the model, targets)."""
        for start in range(0, len(self), size):
            inputs = self.inputs[start : start + size]
            if self._raw:
                inputs = self.examples.prepared(inputs, self.dtype)
            yield start, _laid_out(inputs, self.layout), self.targets[start : start + size]

    @property
    def _raw(self) -> bool:
        return self.examples.normalize is not None and not self.inputs.is_floating_point()

    @classmethod
    def chunks(
        cls,
        examples: Examples,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format,
        batch_size: int,
        budget: int | None,
    ) -> Iterator[tuple[int, Placed]]:
        """Yields (first example, chunk), each of whole batches, so that batches never change; one chunk if it fits.

        On CUDA uint8 pixels stay uint8 (a quarter of the memory) and are normalised there; copies from pageable
        memory are pinned and asynchronous.
        """
        size = _chunk_size(examples, device, dtype, layout, batch_size, budget)
        for first, inputs, targets in examples.chunks(size):
            check_device(inputs, device)
            # a tensor made in inference mode cannot take part in gradients; its copy can
            inputs, targets = (t.clone() if t.is_inference() else t.detach() for t in (inputs, targets))
            if device.type == "cuda" and inputs.device.type == "cpu":
                inputs = inputs.pin_memory().to(device, non_blocking=True)
            if device.type != "cuda" or examples.normalize is None:
                inputs = _laid_out(examples.prepared(inputs.to(device), dtype), layout)
            yield first, cls(examples, inputs, targets.to(device), dtype, layout)


def _laid_out(inputs: Tensor, layout: torch.memory_format) -> Tensor:
    """Returns inputs in the layout: equal data, equal bits, however they came."""
    if inputs.ndim != 4 or not inputs.is_floating_point():
        return inputs.contiguous()
    return inputs.contiguous(memory_format=layout)


def _chunk_size(
    examples: Examples,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
    batch_size: int,
    budget: int | None,
) -> int:
    """Returns how many examples fit into the budget: all, or a multiple of the batch, at least one batch."""
    each = max(1, examples.bytes_per_example)
    if device.type != "cuda" and examples.normalize is not None:
        each *= dtype.itemsize
    if budget is None and device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // 2
    elif budget is None and examples.in_memory and _as_it_is(examples, dtype, layout):
        return len(examples)
    elif budget is None:
        budget = HOST_BUDGET
    fitting = budget // each
    return len(examples) if fitting >= len(examples) else max(1, fitting // batch_size) * batch_size


def _as_it_is(examples: Examples, dtype: torch.dtype, layout: torch.memory_format) -> bool:
    """Returns whether inputs in memory can be used without a copy."""
    first = examples.inputs(0, 1)
    return examples.prepared(first, dtype) is first and (first.ndim != 4 or first.is_contiguous(memory_format=layout))


def two_inputs(examples: Examples, device: torch.device) -> Tensor:
    """Returns two different inputs, prepared in float64; of a single example, itself and its mirror image."""
    raw = examples.inputs(0, min(2, len(examples)))
    check_device(raw, device)
    inputs = examples.prepared(raw.clone(), torch.float64)
    return inputs if len(inputs) == 2 else torch.cat([inputs, inputs.flip(-1)])
