"""Examples: inputs with targets, ids and groups, from tensors or a `Dataset`, in memory or streamed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablate.data.labels import UNLABELLED, checked_targets, item_label
from ablate.data.repeatable import FirstReads
from ablate.data.tensors import as_tensor, refuse_tables
from ablate.errors import DataError
from ablate.immutable import Immutable
from ablate.state import preserved_random_state

Normalize = tuple[Sequence[float], Sequence[float]]
TEXT_GROUP = "text"  # of examples with a target per token, unless groups are given
UNLABELLED_GROUP = "unlabelled"  # of examples without labels, unless groups are given
MISSING = "Labels are missing: give targets, one integer per example, beside the inputs."


class Examples(Immutable):
    """Some examples of one data set, in a fixed order. Immutable.

    Args:
      inputs: A tensor or array (examples, ...), or a map-style `Dataset` whose items are (input, target).
      targets: Class labels (examples,), whole numbers, also as a column (examples, 1); or one target per token
        (examples, tokens), negative where there is nothing to score. None for a `Dataset`: read from its items, once.
      ids: A distinct name per example; default: "0", "1", ... Bytes of file names that are no UTF-8 become digits.
      groups: The group of each example, for reports and edits; default: the label, or "text" for targets per token.
      normalize: For uint8 images (examples, channels, height, width): (mean, std) per channel, of pixels in [0, 1].
        `prepared` applies it, on whatever device a batch is: a quarter of the memory of float32.
    """

    def __init__(
        self,
        inputs: Tensor | npt.NDArray[Any] | Dataset[Any],
        targets: Tensor | npt.NDArray[Any] | Sequence[int] | None = None,
        ids: Sequence[object] | npt.NDArray[Any] | None = None,
        groups: Sequence[object] | npt.NDArray[Any] | None = None,
        *,
        normalize: Normalize | None = None,
    ) -> None:
        refuse_tables(inputs, "Inputs")
        self._inputs: Tensor | Dataset[Any]
        self._inputs = _given(inputs, alone=targets is None)
        if not isinstance(self._inputs, Tensor) and not hasattr(inputs, "__getitem__"):
            raise DataError(
                f"Inputs are a {type(inputs).__name__}, expected a tensor, an array or a map-style Dataset."
            )
        from_items = targets is None
        if targets is None:
            if isinstance(self._inputs, Tensor):
                raise DataError(MISSING)
            with preserved_random_state():  # a data set may draw random numbers
                targets = _labels(self._inputs)
        self.targets: Tensor = checked_targets(as_tensor(targets, "Targets"), lambda: _first_input(self._inputs))
        count = len(self.targets)
        self.ids: tuple[str, ...] = tuple(map(_readable, range(count) if ids is None else ids))
        if groups is None:
            groups = [TEXT_GROUP] * count if self.per_token else self.targets.tolist()
        self.groups: tuple[str, ...] = tuple(map(_readable, groups))
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
        reads = FirstReads(partial(self._example, from_items), count, self._name)
        self._first_reads = None if isinstance(self._inputs, Tensor) else reads
        if self._first_reads is not None and from_items:  # all items were read for their labels: a few more cost little
            self._first_reads.try_out()
        self.normalize = None if normalize is None else _checked_normalize(normalize)
        self._statistics: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        if normalize is not None and isinstance(self._inputs, Tensor):
            self._check_pixels(self._inputs)

    @classmethod
    def of(cls, data: Any, targets: Any = None, *, labelled: bool = True) -> Examples:
        """Returns `data` as Examples: as it is, or made of (inputs, targets), inputs and targets, or a Dataset.

        Without `labelled` inputs need no targets.
        """
        if targets is not None and isinstance(data, (Examples, tuple)):
            raise DataError(f"Targets were given twice: in the {type(data).__name__} and beside it. Give them once.")
        if isinstance(data, Examples):
            return data
        given = data if isinstance(data, tuple) else (data, targets)
        if not labelled and given and isinstance(given[0], (Tensor, np.ndarray)) and given[1:] in ((), (None,)):
            return cls.unlabelled(given[0])
        return cls(*given)

    @classmethod
    def unlabelled(
        cls,
        inputs: Tensor | npt.NDArray[Any] | Dataset[Any],
        ids: Sequence[object] | npt.NDArray[Any] | None = None,
        groups: Sequence[object] | npt.NDArray[Any] | None = None,
        *,
        normalize: Normalize | None = None,
    ) -> Examples:
        """Returns inputs without labels as Examples: for outputs that need none, such as `value`. Targets are -1."""
        count = _length(inputs)
        groups = [UNLABELLED_GROUP] * count if groups is None else groups
        return cls(inputs, np.full(count, UNLABELLED), ids, groups, normalize=normalize)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"<Examples: {len(self):,} in {len(set(self.groups))} groups, {self.hash[:12]}>"

    def inputs(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns the inputs start to stop - 1 as one tensor; a Dataset is read item by item."""
        stop = len(self) if stop is None else stop
        if isinstance(self._inputs, Tensor):
            return self._inputs[start:stop]
        items = self._read(range(start, stop))
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise DataError(
                f"Inputs have different shapes, {sorted(shapes)}: give the data set a transform that resizes."
            )
        stacked = torch.stack(items) if items else torch.zeros(0)
        if self.normalize is not None and items:
            self._check_pixels(stacked)
        return stacked

    def _read(self, positions: range) -> list[Tensor]:
        """Returns the inputs of a data set's items, each the same as when it was read first."""
        reads = self._first_reads
        if reads is None:
            return []
        reads.try_out()
        with preserved_random_state():
            items = [self._example(False, i)[0] for i in positions]
        for i, item in zip(positions, items, strict=True):
            reads.check(i, item)
        return items

    def _example(self, labelled: bool, i: int) -> tuple[Tensor, Any]:
        """Returns the input of a data set's item, and its label where labels are taken from the items."""
        item = _item(self._inputs, i)  # type: ignore[arg-type]  # a data set
        return as_tensor(item[0], f"The input of item {i}"), item[1] if labelled else None

    def _name(self, i: int) -> str:
        return str(i) if self.ids[i] == str(i) else f"{i} ({self.ids[i]!r})"

    def prepared(self, batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns inputs as the model takes them, on the batch's own device.

        With `normalize`: `(pixels / 255 - mean) / std`, rounded to `dtype` once. Otherwise floating inputs are cast to
        `dtype`, and others (tokens) stay as they are.
        """
        if self.normalize is None:
            return batch.to(dtype) if batch.is_floating_point() else batch
        self._check_pixels(batch)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        key = batch.device, exact
        if key not in self._statistics:
            mean, std = (torch.tensor(v, dtype=exact, device=batch.device) for v in self.normalize)
            self._statistics[key] = mean, std
        mean, std = (value.view(-1, *[1] * (batch.ndim - 2)) for value in self._statistics[key])
        return batch.to(exact).div_(255).sub_(mean).div_(std).to(dtype)

    def model_inputs(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the inputs start to stop - 1, prepared."""
        return self.prepared(self.inputs(start, stop), dtype)

    def _check_pixels(self, inputs: Tensor) -> None:
        channels = len(self.normalize[0]) if self.normalize is not None else 0
        if inputs.dtype != torch.uint8 or inputs.ndim < 2 or inputs.shape[1] != channels:
            raise DataError(
                f"Inputs are {inputs.dtype} of shape {tuple(inputs.shape)}, but normalize has {channels} channels: "
                f"expected uint8 of shape (examples, {channels}, height, width). Leave normalize out for inputs that "
                "are ready."
            )

    def input(self, example: int) -> Tensor:
        """Returns one example's input."""
        return self.inputs(example, example + 1)[0]

    @cached_property
    def bytes_per_example(self) -> int:
        """Size of one input in memory."""
        first = self.input(0)
        return first.numel() * first.element_size()

    @property
    def labelled(self) -> bool:
        """Whether there are labels, or targets per token, at all."""
        return self.per_token or bool((self.targets != UNLABELLED).any())

    @property
    def per_token(self) -> bool:
        """Whether there is a target per token instead of one per example."""
        return self.targets.ndim == 2

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
        ids, groups = [self.ids[p] for p in order], [self.groups[p] for p in order]
        return Examples(inputs, self.targets[order], ids, groups, normalize=self.normalize)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Returns `id`, `label` and `group` as stores keep them; the label is -1 where there is a target per token."""
        return {
            "id": np.array(self.ids, dtype=object),
            "label": np.full(len(self), -1, dtype=np.int64) if self.per_token else self.targets.numpy(),
            "group": np.array(self.groups, dtype=object),
        }

    @cached_property
    def hash(self) -> str:
        """The sha256 (hex) of all inputs, targets, ids, groups and `normalize`. Cost: one pass over the data, once."""
        hasher = hashlib.sha256()
        for _, inputs, _ in self.chunks(256):
            for value in inputs.detach().cpu().contiguous():
                hasher.update(f"{value.dtype}:{tuple(value.shape)};".encode())
                hasher.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if self.per_token:
            hasher.update(f"targets:{tuple(self.targets.shape)};".encode())
        hasher.update(self.targets.contiguous().numpy().tobytes())
        hasher.update("\0".join((*self.ids, *self.groups)).encode())
        if self.normalize is not None:
            hasher.update(f";normalize:{self.normalize}".encode())
        return hasher.hexdigest()


def _given(inputs: Any, alone: bool) -> Any:
    """Returns inputs as a tensor, unless they are a data set. A list with targets beside it is rows of numbers.

    A list of pairs (array, target) is a data set, with targets beside it, too.
    """
    listed = isinstance(inputs, (list, tuple)) and not alone and not all(map(_is_pair, inputs))
    if listed and len(inputs) and all(isinstance(item, Tensor) for item in inputs):
        shapes = sorted({tuple(item.shape) for item in inputs})
        if len(shapes) > 1:
            raise DataError(f"Inputs have different shapes, {shapes}: make them one shape, or give a data set.")
        return torch.stack(list(inputs))
    return as_tensor(inputs, "Inputs") if listed or isinstance(inputs, (Tensor, np.ndarray)) else inputs


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], (Tensor, np.ndarray)) and item[0].ndim > 0


def _readable(name: object) -> str:
    """Returns a name as text that can be stored and shown; a file's may hold bytes that are no UTF-8."""
    text = str(name)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair of UTF-16
        return text.encode("utf-8", "backslashreplace").decode()


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


def _first_input(data: Tensor | Dataset[Any]) -> Tensor:
    """Returns the first input, (1, ...)."""
    if isinstance(data, Tensor):
        return data[:1]
    with preserved_random_state():
        return as_tensor(_item(data, 0)[0], "The input of item 0")[None]


def _labels(data: Dataset[Any]) -> Tensor | list[int]:
    """Returns the targets in a data set's items: a class each, or a target per token each."""
    labels = [item_label(_item(data, i), i) for i in range(_length(data))]
    if not any(isinstance(label, Tensor) for label in labels):
        return labels  # type: ignore[return-value]  # all are integers
    shapes = sorted({tuple(label.shape) if isinstance(label, Tensor) else () for label in labels})
    if len(shapes) > 1:
        raise DataError(f"Targets have different shapes, {shapes}: pad them to one length with -100.")
    return torch.stack([label for label in labels if isinstance(label, Tensor)])


def _checked_normalize(normalize: Normalize) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalize)
    except (TypeError, ValueError):
        raise DataError(f"normalize is {normalize!r}, expected (mean, std) with one number per channel each.") from None
    if len(mean) != len(std) or not mean or not all(np.isfinite(mean)) or not all(0 < s < np.inf for s in std):
        raise DataError(f"normalize has mean {mean} and std {std}, expected one number per channel each, std above 0.")
    return mean, std
