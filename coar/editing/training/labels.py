"""The loss of fine-tuning on labels, on all inputs at once or on random batches, and when it is small enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import Examples
from coar.editing.judging.benchmark_sets import content_hashes
from coar.editing.running import BATCH


class LabelLoss:
    """Mean cross-entropy of a model on inputs and labels.

    At most `at_once` inputs are run at a time, whatever a step or `done` needs. Where all inputs fit into that, the
    forward pass for `done` is used by the `loss` that follows it: a step of full-batch training costs one.

    Args:
      model: Any, also one that changes meanwhile.
      inputs: (n, ...).
      labels: (n,) int64.
      stop_loss: `done` once every input is predicted as its label and the loss is this or less; None: never.
      batch_size: Inputs per step, drawn anew each epoch; None, or n and more: all, in their order.
      seed: Of the order of the batches.
      at_once: Inputs run at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        stop_loss: float | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        at_once: int = BATCH,
    ) -> None:
        self._model, self._inputs, self._labels, self._stop_loss = model, inputs, labels, stop_loss
        self._size = len(inputs) if batch_size is None else min(batch_size, len(inputs))
        self._at_once = at_once
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[Tensor] = []
        self._pending: Tensor | None = None
        self.reached = ""  # what the last `done` found, in words

    @property
    def batches(self) -> int:
        """Steps in an epoch: one look at each input."""
        return -(-len(self._inputs) // self._size)

    def done(self) -> bool:
        """Returns whether all inputs are predicted as asked with a small loss."""
        if self._stop_loss is None:
            return False
        keeps = self.batches == 1 and len(self._inputs) <= self._at_once
        right, total = 0, 0.0
        with torch.set_grad_enabled(keeps):
            for inputs, labels in self._parts(self._inputs, self._labels):
                logits = self._model(inputs)
                loss = F.cross_entropy(logits, labels) * (len(labels) / len(self._labels))
                self._pending = loss if keeps else None
                right, total = right + int((logits.argmax(dim=1) == labels).sum()), total + float(loss.detach())
        self.reached = f"{right} of {len(self._labels)} labels are predicted, the loss is {total:.3g}"
        return right == len(self._labels) and total <= self._stop_loss

    def loss(self) -> Iterator[Tensor]:
        """Yields the terms of the loss on the next batch, with gradient."""
        pending, self._pending = self._pending, None
        if pending is not None:
            yield pending
            return
        inputs, labels = self._batch()
        for part, wanted in self._parts(inputs, labels):
            yield F.cross_entropy(self._model(part), wanted) * (len(wanted) / len(labels))

    def _batch(self) -> tuple[Tensor, Tensor]:
        if self.batches == 1:
            return self._inputs, self._labels
        if not self._order:
            order = torch.randperm(len(self._inputs), generator=self._generator)
            self._order = list(torch.split(order.to(self._labels.device), self._size))
        batch = self._order.pop(0)
        return self._inputs[batch], self._labels[batch]

    def _parts(self, inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(torch.split(inputs, self._at_once), torch.split(labels, self._at_once), strict=True)


def contradiction(inputs: Tensor, labels: Tensor) -> str:
    """Returns, in words, which equal inputs have different labels, "" if there are none. Mutates nothing."""
    seen: dict[str, int] = {}
    for i, key in enumerate(content_hashes(Examples(inputs.cpu(), labels.cpu()))):
        first = seen.setdefault(key, i)
        if labels[first] != labels[i]:
            return (
                f"inputs {first} and {i} are the same and their labels are {int(labels[first])} and {int(labels[i])}: "
                "both cannot be learnt"
            )
    return ""
