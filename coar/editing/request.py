"""What an edit should achieve: the examples to change, what they should become, and what should stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablate import Examples
from ablate.data.tensors import as_tensor
from ablate.errors import DataError
from coar.editing.edits.half import HALF, fitting
from coar.editing.given import as_examples
from coar.errors import EditError


@dataclass(frozen=True, eq=False)
class Request:
    """What an edit should achieve. Each method says which fields it needs; the others may stay empty.

    Tensors may be arrays, labels a list, and examples (inputs, targets) or a data set; `checked` makes them one form.

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
        """Returns this request as tensors and Examples, or raises EditError naming every problem in it.

        Labels become int64. Arrays become tensors, lists of labels, too; (inputs, targets) become Examples.

        Args:
          needs: The fields that must be there.
          method: Whose needs they are.
        """
        problems = [f"{name} is missing: {WHAT[name]}." for name in needs if getattr(self, name) is None]
        forms: dict[str, Callable[[str, Any], Any]] = {**dict.fromkeys(TENSORS, _tensor), **EXAMPLES}
        read: dict[str, Any] = {}
        for name, form in forms.items():
            value = getattr(self, name)
            try:
                read[name] = None if value is None else form(name, value)
            except EditError as error:
                problems.append(str(error))
        if not problems:
            request = replace(self, **read)
            problems = _misfits(request)
        if problems:
            raise EditError("\n".join([f"{method} cannot edit with this request:", *(f"  {p}" for p in problems)]))
        return replace(request, labels=None if request.labels is None else request.labels.long())

    def to(self, device: torch.device) -> Request:
        """Returns this request with its tensors on a device; reference and validation stay where they are.

        They are cut off from the gradients and the inference mode that they were made in.
        """
        return self._each(lambda value: (value.clone() if value.is_inference() else value.detach()).to(device))

    def fitting(self, model: nn.Module) -> Request:
        """Returns this request in the precision that a model takes, where half precision is in play."""
        fit = functools.partial(fitting, model)
        masks = self.masks.float() if self.masks is not None and self.masks.dtype in HALF else self.masks
        originals = None if self.originals is None else fit(self.originals)
        return replace(self, inputs=fit(self.inputs), originals=originals, masks=masks)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Request:
        tensors: dict[str, Any] = {
            name: change(value) for name in TENSORS if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **tensors)


TOKENS = (
    "Editing of language models by targets per token is not supported yet: wrap the model so that it returns the "
    "logits of one token, and give one label per input."
)
TENSORS = ("inputs", "labels", "originals", "masks")


def _tensor(name: str, value: Any) -> Tensor:
    """Returns a tensor, given as one, as an array, or, of labels, as a list of integers."""
    try:
        if isinstance(value, (Tensor, np.ndarray)) or (name == "labels" and isinstance(value, (list, tuple, range))):
            return as_tensor(value, name)
    except DataError as error:
        raise EditError(str(error)) from error
    what = "a tensor, an array or a list of integers" if name == "labels" else "a tensor or an array"
    raise EditError(f"{name} is a {type(value).__name__}, expected {what}.")


def _validation(name: str, value: Any) -> tuple[Examples, Examples]:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or isinstance(value[0], (Tensor, np.ndarray)):
        raise EditError(f"{name} is a {type(value).__name__}, expected {WHAT['validation']}.")
    changed, ordinary = (as_examples(part, f"{name}[{i}]") for i, part in enumerate(value))
    return changed, ordinary


EXAMPLES: dict[str, Callable[[str, Any], Any]] = {
    "reference": lambda name, value: as_examples(value, name),
    "validation": _validation,
}
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
