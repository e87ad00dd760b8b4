"""What an edit should achieve: the examples to change, what they should become, and what should stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ablate import Examples
from coar.errors import EditError


@dataclass(frozen=True, eq=False)
class Request:
    """What an edit should achieve. Each method says which fields it needs; the others may stay empty.

    Attributes:
      inputs: (n, ...) as the model takes them: the examples whose prediction should change.
      labels: (n,) int64, what the edited model should predict for them.
      originals: (n, ...) the same examples before the transformation that the model should learn to ignore.
      masks: (n, height, width) float in [0, 1], 1 where the concept is; of the size of the inputs.
      reference: Ordinary examples, as the model takes them: what should stay.
      validation: (examples to be changed, ordinary examples), with the labels they should get, used for nothing else:
        where a method chooses its strength.
    """

    inputs: Tensor
    labels: Tensor | None = None
    originals: Tensor | None = None
    masks: Tensor | None = None
    reference: Examples | None = None
    validation: tuple[Examples, Examples] | None = None

    def checked(self, needs: Sequence[str], method: str) -> Request:
        """Returns this request with labels as int64 tensors, or raises EditError naming every problem in it.

        Args:
          needs: The fields that must be there.
          method: Whose needs they are.
        """
        problems = [f"{name} is missing: {WHAT[name]}." for name in needs if getattr(self, name) is None]
        for name in ("inputs", "labels", "originals", "masks"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                problems.append(f"{name} is a {type(value).__name__}, expected a tensor.")
        if not problems:
            problems += _misfits(self)
        if problems:
            raise EditError("\n".join([f"{method} cannot edit with this request:", *(f"  {p}" for p in problems)]))
        labels = self.labels
        return replace(self, labels=None if labels is None else labels.long())

    def to(self, device: torch.device) -> Request:
        """Returns this request with its tensors on a device; reference and validation stay where they are."""
        tensors: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


TOKENS = (
    "Editing of language models by targets per token is not supported yet: wrap the model so that it returns the "
    "logits of one token, and give one label per input."
)
WHAT = {
    "labels": "the class that each input should get",
    "originals": "each input before its transformation",
    "masks": "1 where the concept is in each input, (n, height, width) from 0 to 1",
    "reference": "ordinary examples, as ablate.Examples, whose predictions should stay",
    "validation": "a pair of ablate.Examples, (to be changed, ordinary), used for nothing else",
}


def _misfits(request: Request) -> list[str]:
    """Returns what does not fit together, in words."""
    inputs, labels, originals, masks = request.inputs, request.labels, request.originals, request.masks
    problems = []
    count = len(inputs) if inputs.ndim else 0
    if not count:
        return [f"inputs have shape {tuple(inputs.shape)}, expected (n, ...) with at least one example."]
    for name, value in (("inputs", inputs), ("originals", originals), ("masks", masks)):
        if value is not None and value.is_floating_point() and not torch.isfinite(value).all():
            bad = next(i for i in range(len(value)) if not torch.isfinite(value[i]).all())
            problems.append(f"{name}[{bad}] holds NaN or infinite values.")
    if labels is not None:
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            found = f"{tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
            tokens = f" {TOKENS}" if labels.ndim == 2 and labels.shape[1] > 1 else ""
            problems.append(f"labels are {found}, expected ({count},) integers: one class per input.{tokens}")
        elif int(labels.min()) < 0:
            problems.append(f"labels hold {int(labels.min())}; classes count from 0.")
    if originals is not None and originals.shape != inputs.shape:
        problems.append(
            f"originals have shape {tuple(originals.shape)}, inputs {tuple(inputs.shape)}: pairs are aligned."
        )
    if masks is not None and torch.isfinite(masks).all():
        expected = (count, *inputs.shape[-2:]) if inputs.ndim == 4 else None
        if expected is None or tuple(masks.shape) != expected:
            size = "of images (n, channels, height, width)" if expected is None else str(expected)
            problems.append(f"masks have shape {tuple(masks.shape)}, expected {size}: one per input, of its size.")
        elif not masks.is_floating_point() or float(masks.min()) < 0 or float(masks.max()) > 1:
            problems.append("masks must be floating point from 0 (elsewhere) to 1 (the concept).")
    return problems
