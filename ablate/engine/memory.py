"""How much memory a forward takes: measured on a few examples, predicted for a batch, kept under a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablate.errors import OutOfMemoryError

PROBE = (2, 6)  # examples per measured forward


@dataclass(frozen=True)
class MemoryPlan:
    """Peak memory on the engine's device, in bytes.

    Attributes:
      model: Weights, buffers and the kept originals of gated weights.
      forward_fixed, forward_each: Activations at the peak of a forward: fixed, and per example of the batch.
      gradient_fixed, gradient_each: The same for `gate_gradients`, which keeps activations for its backward.
      input_each: One example's prepared input, held while its chunk is worked on.
      batch_size, gradient_batch_size: Examples per forward that the engine uses, after any budget.
    """

    model: int
    forward_fixed: int
    forward_each: int
    gradient_fixed: int
    gradient_each: int
    input_each: int
    batch_size: int
    gradient_batch_size: int

    @property
    def forward(self) -> tuple[int, int]:
        """Bytes of a forward: fixed, and per example."""
        return self.forward_fixed, self.forward_each

    @property
    def gradient(self) -> tuple[int, int]:
        """Bytes of a forward and backward: fixed, and per example."""
        return self.gradient_fixed, self.gradient_each

    def peak(self, examples: int, gradients: bool = False) -> int:
        """Returns the predicted peak of a call, with so many examples' inputs held on the device."""
        fixed, each = self.gradient if gradients else self.forward
        batch = self.gradient_batch_size if gradients else self.batch_size
        return self.model + examples * self.input_each + fixed + min(batch, examples) * each


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all tensors made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self._known or key in given:
                continue
            self._known.add(key)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measured_peak(run: Callable[[], object]) -> int:
    """Returns the largest number of bytes that tensors made by `run` held at one time."""
    live = _Live()
    with torch.compiler.set_stance("force_eager"), live:
        run()
    return live.peak


def per_example(run: Callable[[int], object]) -> tuple[int, int]:
    """Returns (fixed, per example) bytes of a run on so many examples, from two small ones."""
    small, large = (measured_peak(lambda n=n: run(n)) for n in PROBE)  # type: ignore[misc]
    each = max(1, (large - small) // (PROBE[1] - PROBE[0]))
    return max(0, small - PROBE[0] * each), each


def fitting_batch(budget: int, wanted: int, model: int, fixed: int, each: int) -> int:
    """Returns the largest batch, at most `wanted`, that stays under a budget in bytes.

    Raises:
      OutOfMemoryError: Not even one example fits.
    """
    room = budget - model - fixed
    if room < each:
        need = model + fixed + each
        raise OutOfMemoryError(
            f"The model and one example need {need / 2**20:,.1f} MiB ({model / 2**20:,.1f} MiB of weights). Half of "
            "what memory_budget leaves beside the weights is for activations; with the weights that is "
            f"{budget / 2**20:,.1f} MiB. Give a larger memory_budget, or use precision='bfloat16'."
        )
    return min(wanted, room // each)
