"""Examples: inputs with targets, ids and groups, from tensors or a `Dataset`, in memory or streamed."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablate.errors import DataError
from ablate.state import preserved_random_state


class Examples:
    """Some examples of one data set, in a fixed order. Immutable.

    Args:
      inputs: A tensor or array (examples, ...), or a map-style `Dataset` whose items are (input, target).
      targets: Class labels (examples,), integers. None for a `Dataset`: read from its items, once.
      ids: A distinct name per example; default: "0", "1", ...
      groups: The group of each example, for reports and edits; default: the label.
    """

    def __init__(
        self,
        inputs: Tensor | npt.NDArray[Any] | Dataset[Any],
        targets: Tensor | npt.NDArray[Any] | Sequence[int] | None = None,
        ids: Sequence[object] | npt.NDArray[Any] | None = None,
        groups: Sequence[object] | npt.NDArray[Any] | None = None,
    ) -> None:
        self._inputs: Tensor | Dataset[Any]
        self._inputs = _tensor(inputs, "Inputs") if isinstance(inputs, (Tensor, np.ndarray)) else inputs
        if not isinstance(self._inputs, Tensor) and not hasattr(inputs, "__getitem__"):
            raise DataError(
                f"Inputs are a {type(inputs).__name__}, expected a tensor, an array or a map-style Dataset."
            )
        if targets is None:
            if isinstance(self._inputs, Tensor):
                raise DataError("Labels are missing: give targets, one integer per example, beside the inputs.")
            with preserved_random_state():  # a data set may draw random numbers
                targets = [_label(self._inputs, i) for i in range(_length(self._inputs))]
        raw = _tensor(targets, "Targets")
        if raw.ndim != 1 or raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
            raise DataError(
                f"Targets are {raw.dtype} of shape {tuple(raw.shape)}, expected integers of shape (examples,)."
            )
        self.targets: Tensor = raw.to(device="cpu", dtype=torch.int64)
        count = len(self.targets)
        self.ids: tuple[str, ...] = tuple(map(str, range(count) if ids is None else ids))
        self.groups: tuple[str, ...] = tuple(map(str, self.targets.tolist() if groups is None else groups))
        lengths = {"inputs": _length(self._inputs), "targets": count, "ids": len(self.ids), "groups": len(self.groups)}
        if len(set(lengths.values())) != 1 or count == 0:
            raise DataError(
                f"Examples do not line up: {lengths}. Expected one of each per example, at least one example."
            )
        if len(set(self.ids)) != count:
            again = next(name for name, times in Counter(self.ids).items() if times > 1)
            raise DataError(
                f"Ids must be distinct: {count - len(set(self.ids))} of {count} repeat another, the first is {again!r}."
            )

    @classmethod
    def of(cls, data: Any, targets: Any = None) -> Examples:
        """Returns `data` as Examples: as it is, or made of (inputs, targets), inputs and targets, or a Dataset."""
        if targets is not None and isinstance(data, (Examples, tuple)):
            raise DataError(f"Targets were given twice: in the {type(data).__name__} and beside it. Give them once.")
        if isinstance(data, Examples):
            return data
        if isinstance(data, tuple):
            return cls(*data)
        return cls(data, targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"<Examples: {len(self):,} in {len(set(self.groups))} groups, {self.hash[:12]}>"

    def inputs(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns the inputs start to stop - 1 as one tensor; a Dataset is read item by item."""
        stop = len(self) if stop is None else stop
        if isinstance(self._inputs, Tensor):
            return self._inputs[start:stop]
        with preserved_random_state():
            items = [_tensor(_item(self._inputs, i)[0], f"The input of item {i}") for i in range(start, stop)]
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise DataError(
                f"Inputs have different shapes, {sorted(shapes)}: give the data set a transform that resizes."
            )
        return torch.stack(items)

    def input(self, example: int) -> Tensor:
        """Returns one example's input."""
        return self.inputs(example, example + 1)[0]

    @cached_property
    def bytes_per_example(self) -> int:
        """Size of one input in memory."""
        first = self.input(0)
        return first.numel() * first.element_size()

    @property
    def in_memory(self) -> bool:
        """Whether the inputs are a tensor already."""
        return isinstance(self._inputs, Tensor)

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (first example, inputs, targets) for runs of at most `size` examples."""
        for start in range(0, len(self), size):
            stop = min(len(self), start + size)
            yield start, self.inputs(start, stop), self.targets[start:stop]

    def take(self, positions: Sequence[int] | npt.NDArray[Any]) -> Examples:
        """Returns the examples at these positions, in this order, with their ids and groups."""
        order = [int(p) for p in positions]
        inputs = torch.stack([self.input(p) for p in order]) if order else torch.zeros(0)
        return Examples(inputs, self.targets[order], [self.ids[p] for p in order], [self.groups[p] for p in order])

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Returns `id`, `label` and `group` as stores keep them."""
        return {
            "id": np.array(self.ids, dtype=object),
            "label": self.targets.numpy(),
            "group": np.array(self.groups, dtype=object),
        }

    @cached_property
    def hash(self) -> str:
        """The sha256 (hex) of all inputs, targets, ids and groups. Cost: one pass over the data, once."""
        hasher = hashlib.sha256()
        for _, inputs, _ in self.chunks(256):
            for value in inputs.detach().cpu().contiguous():
                hasher.update(f"{value.dtype}:{tuple(value.shape)};".encode())
                hasher.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        hasher.update(self.targets.numpy().tobytes())
        hasher.update("\0".join((*self.ids, *self.groups)).encode())
        return hasher.hexdigest()


def _length(data: Any) -> int:
    try:
        return len(data)
    except TypeError as error:
        raise DataError(f"A {type(data).__name__} has no length: give a map-style Dataset (with __len__).") from error


def _item(data: Dataset[Any], i: int) -> Sequence[Any]:
    item = data[i]
    if not isinstance(item, (tuple, list)) or not item:
        raise DataError(f"Item {i} of the {type(data).__name__} is a {type(item).__name__}, expected (input, target).")
    return item


def _label(data: Dataset[Any], i: int) -> int:
    item = _item(data, i)
    try:
        return operator.index(item[1])
    except (IndexError, TypeError, ValueError):
        got = repr(item[1]) if len(item) > 1 else "nothing"
        raise DataError(f"The label of item {i} is {got}, expected an integer: the class.") from None


def _tensor(values: Any, what: str) -> Tensor:
    """Returns values as a tensor, sharing memory where possible; nothing here writes to it."""
    try:
        if isinstance(values, np.ndarray) and min(values.strides, default=0) < 0:
            values = values.copy()  # torch takes no reversed views
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{what} cannot become a tensor: {reason}. Give numbers; images need a transform.") from error
