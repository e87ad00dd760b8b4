"""The loss of fine-tuning on labels, on all inputs at once or on random batches, and when it is small enough."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelLoss:
    """Mean cross-entropy of a model on inputs and labels.

    A forward pass for `done` is used by the `loss` that follows it: a step of full-batch training costs one.

    Args:
      model: Any, also one that changes meanwhile.
      inputs: (n, ...).
      labels: (n,) int64.
      stop_loss: `done` once every input is predicted as its label and the loss is this or less; None: never.
      batch_size: Inputs per step, drawn anew each epoch; None, or n and more: all, in their order.
      seed: Of the order of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        stop_loss: float | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._inputs, self._labels, self._stop_loss = model, inputs, labels, stop_loss
        self._size = len(inputs) if batch_size is None else min(batch_size, len(inputs))
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[Tensor] = []
        self._pending: Tensor | None = None

    @property
    def batches(self) -> int:
        """Steps in an epoch: one look at each input."""
        return -(-len(self._inputs) // self._size)

    def done(self) -> bool:
        """Returns whether all inputs are predicted as asked with a small loss."""
        if self._stop_loss is None:
            return False
        logits = self._model(self._inputs)
        loss = F.cross_entropy(logits, self._labels)
        self._pending = loss if self.batches == 1 else None
        right = bool((logits.argmax(dim=1) == self._labels).all())
        return right and float(loss.detach()) <= self._stop_loss

    def loss(self) -> Tensor:
        """Returns the loss on the next batch, with gradient."""
        pending, self._pending = self._pending, None
        if pending is not None:
            return pending
        if self.batches == 1:
            return F.cross_entropy(self._model(self._inputs), self._labels)
        if not self._order:
            order = torch.randperm(len(self._inputs), generator=self._generator)
            self._order = list(torch.split(order.to(self._labels.device), self._size))
        batch = self._order.pop(0)
        return F.cross_entropy(self._model(self._inputs[batch]), self._labels[batch])
