"""Shapes of shards and inner chunks, so that every reader finds what it asks for in few pieces with little else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

Shape = tuple[int, ...]  # rows, columns
Positions = slice | npt.NDArray[np.integer[Any]]

ROW, COLUMN = "row", "column"
COPY_KINDS = (ROW, COLUMN)

SLAB_COLUMNS = 2048  # inner chunks of campaigns: a slab of examples is read without touching the rest of a shard
TILE_BYTES = 64 * 2**10  # inner chunks of attributions: one component's column must not cost the whole shard
COPY_BYTES = 512 * 2**10  # inner chunks of copies: read whole for every row or column
SHARD_BYTES = 128 * 2**20  # shards of copies
LONGEST = 2**16  # rows of a column, or columns of a row, in one inner chunk of a copy: bounds the memory of copying
MOST_ACROSS = 64  # rows or columns side by side in one inner chunk of a copy

# What reading costs, roughly, on a local disk: opening a file, one piece of it, and its bytes. Only ratios matter.
FILE_SECONDS, PIECE_SECONDS, BYTE_SECONDS = 1e-3, 1e-4, 1e-9


def slab_width(columns: int) -> int:
    """Returns the width of inner chunks for readers of slabs of columns: at most 2,048, and all about equal."""
    return _balanced(columns, SLAB_COLUMNS)


def tile_width(block: int, columns: int, itemsize: int) -> int:
    """Returns the width of inner chunks for readers of single rows and single columns alike.

    A row costs all pieces of one shard, a column one piece of every shard: few wide pieces are good for the one, narrow
    ones for the other.
    """
    return _balanced(columns, min(SLAB_COLUMNS, max(1, TILE_BYTES // (block * itemsize))))


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in storage: files of `shard` (rows, columns), read in pieces of `inner` (rows, columns)."""

    shard: Shape
    inner: Shape
    itemsize: int

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Layout:
        """Returns the layout of a stored matrix."""
        return cls(array.shards or array.chunks, array.chunks, array.dtype.itemsize)

    def seconds(self, shape: Shape, rows: Positions, columns: Positions) -> float:
        """Returns about what it costs to read rows and columns of a matrix: good for comparing layouts only."""
        chosen = (_resolved(rows, shape[0]), _resolved(columns, shape[1]))
        files = _touched(chosen[0], self.shard[0]) * _touched(chosen[1], self.shard[1])
        pieces = _touched(chosen[0], self.inner[0]) * _touched(chosen[1], self.inner[1])
        size = self.inner[0] * self.inner[1] * self.itemsize
        return files * FILE_SECONDS + pieces * (PIECE_SECONDS + size * BYTE_SECONDS)

    def files(self, shape: Shape, rows: Positions, columns: Positions) -> list[tuple[int, int]]:
        """Returns the numbers (down, across) of the shards that hold rows and columns of a matrix."""
        down, across = (
            _parts(_resolved(positions, length), size)
            for positions, length, size in zip((rows, columns), shape, self.shard, strict=True)
        )
        return [(int(i), int(j)) for i in down for j in across]

    def regions(self, shape: Shape) -> list[tuple[slice, slice]]:
        """Returns the rows and columns of every shard, in order."""
        return [
            (slice(top, min(top + self.shard[0], shape[0])), slice(left, min(left + self.shard[1], shape[1])))
            for top in range(0, shape[0], self.shard[0])
            for left in range(0, shape[1], self.shard[1])
        ]


def copy_layout(kind: str, shape: Shape, itemsize: int, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Returns the layout of a copy for single rows (`row`) or single columns (`column`) of a matrix.

    An inner chunk is a whole row or column (of more than 65,536 numbers: an equal part of it), or a few side by side.
    """
    length, count = shape if kind == COLUMN else shape[::-1]
    along = _balanced(length, LONGEST)
    across = min(max(1, COPY_BYTES // (along * itemsize)), MOST_ACROSS, max(1, count))
    groups = -(-max(1, count) // across)
    wide = across * _balanced(groups, max(1, shard_bytes // (along * across * itemsize)))
    if kind == COLUMN:
        return Layout((along, wide), (along, across), itemsize)
    return Layout((wide, along), (across, along), itemsize)


def _balanced(length: int, most: int) -> int:
    """Returns the size of parts that cover a length: as few as can be, none larger than `most`, about equal.

    The last part is filled up in storage, so that equal parts waste least.
    """
    length = max(1, length)
    return -(-length // -(-length // most))


def _resolved(positions: Positions, length: int) -> Positions:
    return slice(*positions.indices(length)) if isinstance(positions, slice) else positions


def _touched(positions: Positions, size: int) -> int:
    """Returns how many parts of a size hold the positions."""
    return len(_parts(positions, size))


def _parts(positions: Positions, size: int) -> npt.NDArray[np.integer[Any]]:
    if isinstance(positions, slice) and positions.step == 1:
        return np.arange(positions.start // size, -(-max(positions.start, positions.stop) // size))
    if isinstance(positions, slice):
        positions = np.arange(positions.start, positions.stop, positions.step)
    return np.unique(positions // size)
