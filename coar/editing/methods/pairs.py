"""Values of a block for the inputs to change, and what they should be: batch by batch, in memory as far as it goes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coar.editing.where.blocks import Block, Captured, capture, captured, run_block, run_until
from coar.errors import EditError

TargetName = Literal["original", "symmetric"]
HELD = 256 * 2**20  # bytes of captured values that are kept; what exceeds them is computed again when it is needed


class Pairs:
    """The inputs of a block for the examples to change, and its values, by the original model, for their originals.

    Batches stay what they were captured in: the same examples then give the same bits, and a pair of equal inputs a
    loss of exactly zero.

    Args:
      model: Whose weights change later.
      block: What is run alone.
      inputs, originals: (n, ...), aligned.
      batch_size: Examples at a time.
      held: Bytes of captured values that are kept. Batches beyond are captured anew each time, from a copy of the model
        as it is now: one more copy, and a forward pass of the model up to the block.
    """

    def __init__(
        self, model: nn.Module, block: Block, inputs: Tensor, originals: Tensor, batch_size: int, held: int = HELD
    ) -> None:
        self._model, self._block = model, block
        self._inputs, self._originals = torch.split(inputs, batch_size), torch.split(originals, batch_size)
        self.examples = len(inputs)
        self._kept: list[tuple[Captured, Captured]] = []
        capture(model, block, inputs[:batch_size], batch_size)  # refuses a block that does not run alone
        full = False
        for i in range(len(self._inputs)):
            pair = self._captured(model, i)
            for (_, _, output), what in zip(pair, ("inputs", "originals"), strict=True):
                if not bool(torch.isfinite(output).all()):
                    raise EditError(f"{block.modules[-1]!r} gives NaN or infinite values for the {what}.")
            if not i:
                self._shape = tuple(pair[1][2].shape[1:])
            held -= _bytes(pair)
            full = full or held < 0
            if not full:
                self._kept.append(pair)
        self._source = copy.deepcopy(model) if len(self._kept) < len(self._inputs) else model

    def value_shape(self) -> tuple[int, ...]:
        """Returns the shape of one example's value."""
        return self._shape

    def values(self, frozen: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields per batch (value now for the inputs, value for the originals: of the original model, or now)."""
        for i in range(len(self._inputs)):
            changed, original = self._kept[i] if i < len(self._kept) else self._captured(self._source, i)
            value = run_block(self._model, self._block, *changed[:2])
            yield value, original[2] if frozen else run_block(self._model, self._block, *original[:2])

    def _captured(self, model: nn.Module, i: int) -> tuple[Captured, Captured]:
        with torch.no_grad():
            return captured(model, self._block, self._inputs[i]), captured(model, self._block, self._originals[i])


class ThroughoutPairs:
    """As `Pairs`, where weights before the block change, too: the model is run up to the end of the block."""

    def __init__(
        self, model: nn.Module, block: Block, inputs: Tensor, originals: Tensor, batch_size: int, held: int = HELD
    ) -> None:
        self._model, self._block = model, block
        self._inputs, self._originals = torch.split(inputs, batch_size), torch.split(originals, batch_size)
        self.examples = len(inputs)
        self._kept: list[Tensor] = []
        for batch in self._originals:
            target = self._target(model, batch)
            held -= _bytes(target)
            if held < 0:
                break
            self._kept.append(target)
        self._source = copy.deepcopy(model) if len(self._kept) < len(self._originals) else model

    def values(self, frozen: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields what `Pairs.values` does."""
        for i, (changed, original) in enumerate(zip(self._inputs, self._originals, strict=True)):
            value = run_until(self._model, self._block, changed)
            if not frozen:
                yield value, run_until(self._model, self._block, original)
            else:
                yield value, self._kept[i] if i < len(self._kept) else self._target(self._source, original)

    def _target(self, model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return run_until(model, self._block, batch).detach()


def _bytes(value: object) -> int:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
