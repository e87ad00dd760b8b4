"""Rows: a lazy view of the finished rows of a block array, indexed like a numpy array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.blocks.blocks import Blocks, as_slice
from stores.blocks.copies import Copies

Array = npt.NDArray[Any]
Index = int | slice | Sequence[int] | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]


class Rows:
    """A lazy view of the finished rows of one block array: index it like a numpy array to read.

    `view[rows]` or `view[rows, columns]`; rows are counted among those that were finished when the view was made, so a
    campaign that is still running shows what it has and never what it has not. Two lists select every combination, as
    `numpy.ix_` does. Reading mutates nothing.
    """

    def __init__(
        self, blocks: Blocks, name: str, decode: Any = None, width: int | None = None, copies: Copies | None = None
    ) -> None:
        self._blocks = blocks
        self._name = name
        self._decode = decode
        self._copies = copies
        self._rows = blocks.finished_rows()
        array = blocks.arrays[name]
        tail = array.shape[1:] if width is None else (width,)
        self.shape: tuple[int, ...] = (len(self._rows), *tail)
        self.dtype: np.dtype[Any] = np.dtype(np.bool_) if decode else np.dtype(array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self._name}: {' x '.join(map(str, self.shape))} {self.dtype}, read by indexing>"

    def __getitem__(self, key: Index | tuple[Index, ...]) -> Array:
        keys = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(keys) <= len(self.shape):
            raise IndexError(f"{self._name} has {len(self.shape)} dimensions, got {len(keys)} indices.")
        at = _positions(keys[0], self.shape[0])
        rows = self._rows[np.atleast_1d(at)]
        if len(self.shape) == 1:
            values = self._blocks.take(self._name, rows)
            return values[0] if at.ndim == 0 else values
        columns = _positions(keys[1], self.shape[1]) if len(keys) > 1 else np.arange(self.shape[1])
        if self._decode is None:
            values = self._take(rows, as_slice(np.atleast_1d(columns)))
        else:
            values = self._decode(self._blocks.take(self._name, rows))[:, np.atleast_1d(columns)]
        values = values[:, 0] if columns.ndim == 0 else values
        return values[0] if at.ndim == 0 else values

    def _take(self, rows: npt.NDArray[np.int64], columns: slice | Array) -> Array:
        """Returns rows and columns from wherever they are read fastest."""
        if self._copies is not None and len(rows):
            found = self._copies.take(self._name, as_slice(rows), columns)
            if found is not None:
                return found
        return self._blocks.take(self._name, rows, columns)

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype=dtype)


def _positions(key: Any, length: int) -> npt.NDArray[np.intp]:
    """Returns the positions that an index along one axis selects; 0-d for a single one."""
    if isinstance(key, slice):
        return np.arange(length)[key]
    if key is Ellipsis:
        return np.arange(length)
    index = np.asarray(key)
    if index.size == 0 and index.ndim == 1:
        index = index.astype(np.intp) if index.dtype.kind != "b" else index
    if (index.dtype.kind in "iu" and index.ndim <= 1) or (index.dtype.kind == "b" and index.ndim == 1):
        return np.asarray(np.arange(length)[index])
    raise IndexError(f"Index {key!r} is no int, slice, or 1-D list of ints or bools.")
