"""Blocks of rows, written once: data, then the sha256 of what storage gives back, then the ledger mark; in order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.sync import sync

from stores.errors import DamagedBlockError, StoreError, UnfinishedStoreError
from stores.schema import BLOCKS, DIGEST

Array = npt.NDArray[Any]
RowIndex = int | slice | Sequence[int] | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]

INNER_COLUMNS = 2048  # columns of an inner chunk: a slab of examples is read without touching the rest of a shard
# An absent chunk must never pass for a written one: write chunks that equal the fill value, too.
KEEP_EMPTY: ArrayConfigParams = {"write_empty_chunks": True}


def add_block_array(
    group: zarr.Group, name: str, rows: int, block: int, columns: int | None, dtype: str, dimensions: tuple[str, ...]
) -> None:
    """Adds an array whose rows come in blocks, one file per block. Floats are NaN until written."""
    fill = np.nan if np.dtype(dtype).kind == "f" else 0
    shape: tuple[int, ...] = (rows,) if columns is None else (rows, columns)
    chunks: tuple[int, ...] = (block,)
    shards: tuple[int, ...] | None = None
    if columns is not None:
        inner = min(max(1, columns), INNER_COLUMNS)
        chunks = (block, inner)
        shards = (block, -(-max(1, columns) // inner) * inner)
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        compressors=[Crc32cCodec()],  # a flipped bit is an error when read, not a number
        fill_value=fill,
        dimension_names=dimensions,
        config=KEEP_EMPTY,
    )


def add_ledger(group: zarr.Group, rows: int, block: int) -> None:
    """Adds the ledger: per block the sha256 of its data, all zeros (no file) while it is not finished."""
    group.create_array(
        "ledger",
        shape=(-(-rows // block), 32),
        dtype="uint8",
        chunks=(1, 32),
        compressors=None,
        fill_value=0,
        dimension_names=(BLOCKS, DIGEST),
        config=KEEP_EMPTY,
    )


class Blocks:
    """The block arrays of one open store, and the ledger that says which blocks are finished."""

    def __init__(self, group: zarr.Group, names: Sequence[str], where: str) -> None:
        self.where = where
        self.arrays: dict[str, zarr.Array[Any]] = {name: _array(group, name, where) for name in names}
        self._ledger = _array(group, "ledger", where)
        first = self.arrays[names[0]]
        self.rows: int = first.shape[0]
        self.block: int = (first.shards or first.chunks)[0]
        self.count: int = self._ledger.shape[0]

    def __len__(self) -> int:
        return self.count

    def span(self, block: int) -> slice:
        """Returns the rows of a block."""
        if not 0 <= block < self.count:
            raise IndexError(f"{self.where}: block {block} does not exist; blocks are 0 to {self.count - 1}.")
        return slice(block * self.block, min(self.rows, (block + 1) * self.block))

    def digests(self) -> Array:
        """Returns the ledger as it is in storage now: (blocks, 32) uint8, zeros where a block is not finished."""
        return np.asarray(self._ledger[:])

    def finished(self) -> npt.NDArray[np.bool_]:
        """Returns which blocks are finished, (blocks,) bool, as of now."""
        return np.asarray(self.digests().any(axis=1))

    def finished_rows(self) -> npt.NDArray[np.int64]:
        """Returns the row numbers of all finished blocks, ascending."""
        spans = [self.span(int(block)) for block in np.flatnonzero(self.finished())]
        return np.concatenate([np.arange(s.start, s.stop) for s in spans] or [np.zeros(0)]).astype(np.int64)

    def write(self, block: int, values: Mapping[str, Array]) -> None:
        """Writes a whole block and marks it finished: afterwards it is data, until then it is nothing.

        Raises:
          ValueError: An array is missing or has not the block's shape.
          StoreError: The block is finished already, or storage gave back something else than was written.
        """
        span = self.span(block)
        if self.finished()[block]:
            raise StoreError(f"{self.where}: block {block} is finished; finished blocks are never rewritten.")
        for name, array in self.arrays.items():
            expected = (span.stop - span.start, *array.shape[1:])
            got = values[name].shape if name in values else None
            if got != expected:
                raise ValueError(f"{self.where}: block {block} of {name!r} has shape {got}, expected {expected}.")
        written = {name: np.ascontiguousarray(values[name], dtype=array.dtype) for name, array in self.arrays.items()}
        for name, array in self.arrays.items():
            array[span] = written[name]
        digest = _digest(self._stored(block))
        if digest != _digest(written):
            raise StoreError(f"{self.where}: storage gave back other bytes than were written for block {block}.")
        self._ledger[block] = np.frombuffer(digest, dtype=np.uint8)

    def read(self, block: int) -> dict[str, Array]:
        """Returns the arrays of a finished block, checked against the ledger's sha256.

        Raises:
          UnfinishedStoreError: The block is not finished.
          DamagedBlockError: It is, but storage no longer holds what was written.
        """
        mark = np.asarray(self._ledger[block])
        if not mark.any():
            raise UnfinishedStoreError(f"{self.where}: block {block} is not finished. Run the same command again.")
        values = self._stored(block)
        if _digest(values) != mark.tobytes():
            raise self._damaged(block, "its sha256 is not the one in the ledger")
        return values

    def _stored(self, block: int) -> dict[str, Array]:
        span = self.span(block)
        try:
            return {name: np.asarray(array[span]) for name, array in self.arrays.items()}
        except (ValueError, RuntimeError, OSError) as error:  # what zarr's codecs raise for bad bytes
            raise self._damaged(block, str(error)) from error

    def _damaged(self, block: int, why: str) -> DamagedBlockError:
        span = self.span(block)
        return DamagedBlockError(
            f"{self.where}: block {block} (rows {span.start} to {span.stop - 1}) is damaged: {why}. "
            f"Delete its mark {self.where}/ledger/c/{block}/0 and run the same command again to recompute it."
        )

    def check_present(self) -> None:
        """Raises DamagedBlockError if a finished block has lost a file. Cost: one look per file, no data is read."""
        store = self._ledger.store
        for name, array in self.arrays.items():
            for block in np.flatnonzero(self.finished()):
                key = "/".join([array.path, "c", str(block), *["0"] * (array.ndim - 1)])
                if not sync(store.exists(key)):
                    raise self._damaged(int(block), f"the file of {name!r} is gone")

    def take(self, name: str, rows: Array, columns: Any = slice(None), nan_is_lost: bool = True) -> Array:
        """Returns rows (by number; all finished) and columns of one array.

        Bytes are checked by crc32c as they are read. NaN is never stored as an output, weight or bias, so it means a
        lost file; `nan_is_lost=False` is for quality columns, where NaN says that a number is undefined.
        """
        array = self.arrays[name]
        try:
            if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
                span = slice(int(rows[0]), int(rows[0]) + len(rows))
                found = array.oindex[(span, columns)] if array.ndim > 1 else array[span]
            else:
                found = array.oindex[(rows, columns)] if array.ndim > 1 else array.oindex[(rows,)]
        except (ValueError, RuntimeError, OSError) as error:
            raise DamagedBlockError(
                f"{self.where}: {name!r} cannot be read in rows {rows.min()} to {rows.max()}: {error}. "
                "A block is damaged: read it block by block to find which."
            ) from error
        values: Array = np.asarray(found)
        if nan_is_lost and values.dtype.kind == "f" and np.isnan(values).any():
            row = int(rows[np.argwhere(np.isnan(values.reshape(len(rows), -1)))[0, 0]])
            raise self._damaged(row // self.block, f"{name!r} has no data in row {row}")
        return values


class Rows:
    """A lazy view of the finished rows of one block array: index it like a numpy array to read.

    `view[rows]` or `view[rows, columns]`; rows are counted among the finished ones, so a campaign that is still
    running shows what it has and never what it has not. Reading mutates nothing.
    """

    def __init__(self, blocks: Blocks, name: str, decode: Any = None, width: int | None = None) -> None:
        self._blocks = blocks
        self._name = name
        self._decode = decode
        self._rows = blocks.finished_rows()
        array = blocks.arrays[name]
        tail = array.shape[1:] if width is None else (width,)
        self.shape: tuple[int, ...] = (len(self._rows), *tail)
        self.dtype: np.dtype[Any] = np.dtype(np.bool_) if decode else np.dtype(array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self._name}: {' x '.join(map(str, self.shape))} {self.dtype}, read by indexing>"

    def __getitem__(self, key: RowIndex | tuple[RowIndex, Any]) -> Array:
        row_key, columns = key if isinstance(key, tuple) else (key, slice(None))
        rows = self._rows[row_key]
        single = np.ndim(rows) == 0
        rows = np.atleast_1d(rows)
        if self._decode is None:
            values = self._blocks.take(self._name, rows, _column_key(columns, self.shape))
        else:
            values = self._decode(self._blocks.take(self._name, rows))[:, columns]
        if np.ndim(columns) == 0 and not isinstance(columns, slice) and values.ndim > 1:
            values = values[:, 0]
        return values[0] if single else values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype=dtype)


def _column_key(columns: Any, shape: tuple[int, ...]) -> Any:
    """Returns a column index that zarr takes: slices as they are, everything else as a list of positions."""
    if isinstance(columns, slice) or len(shape) == 1:
        return columns
    return np.atleast_1d(np.arange(shape[1])[columns])


def _array(group: zarr.Group, name: str, where: str) -> zarr.Array[Any]:
    try:
        found = group[name]
    except KeyError:
        found = None
    if not isinstance(found, zarr.Array):
        raise StoreError(f"{where}: the array {name!r} is missing. The store is damaged; run again into a new one.")
    array: zarr.Array[Any] = found.with_config(KEEP_EMPTY)
    return array


def _digest(values: Mapping[str, Array]) -> bytes:
    """Returns the sha256 of the arrays' names, dtypes, shapes and bytes."""
    hasher = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        hasher.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
        hasher.update(value.data)
    return hasher.digest()
