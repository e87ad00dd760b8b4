"""Blocks of rows, written once by whoever is first: data, then the sha256 of what storage gives back, then the mark."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.storage import MemoryStore, StorePath

from stores.blocks.reading import BAD_BYTES, ArrayReader, stored_size
from stores.errors import DamagedBlockError, StoreError, UnfinishedStoreError
from stores.format.groups import BLOCKS, DIGEST
from stores.format.layout import slab_width
from stores.storage import objects

Array = npt.NDArray[Any]

DIGEST_BYTES = 32
# An absent chunk must never pass for a written one: write chunks that equal the fill value, too.
KEEP_EMPTY: ArrayConfigParams = {"write_empty_chunks": True}


def add_block_array(
    group: zarr.Group,
    name: str,
    rows: int,
    block: int,
    columns: int | None,
    dtype: str,
    dimensions: tuple[str, ...],
    inner: int | None = None,
) -> None:
    """Adds an array whose rows come in blocks, one file per block. Floats are NaN until written.

    `inner`: how many columns are read together; None: as many as a reader of slabs of columns needs.
    """
    fill = np.nan if np.dtype(dtype).kind == "f" else 0
    shape: tuple[int, ...] = (rows,) if columns is None else (rows, columns)
    chunks: tuple[int, ...] = (block,)
    shards: tuple[int, ...] | None = None
    if columns is not None:
        inner = inner or slab_width(columns)
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
        shape=(-(-rows // block), DIGEST_BYTES),
        dtype="uint8",
        chunks=(1, DIGEST_BYTES),
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
        self._readers = {name: ArrayReader(array) for name, array in self.arrays.items()}
        self._snapshot: Array | None = None
        self.store = self._ledger.store
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
        """Returns the ledger, (blocks, 32) uint8, zeros where a block is not finished.

        As it was when first looked at if the store is open for reading, so that everything read from one open store
        belongs together while a campaign goes on; as it is now if it is open for writing.
        """
        if self._snapshot is None or not self._ledger.read_only:
            self._snapshot = self._read_ledger()
        return self._snapshot

    def _read_ledger(self) -> Array:
        """Reads the marks that are there: one listing, and an object for each."""
        marks = np.zeros(self._ledger.shape, dtype=np.uint8)
        names = objects.names(self.store, f"{self._ledger.path}/c")
        there = [int(name) for name in names if name.isdecimal() and int(name) < self.count]
        for block, mark in zip(there, objects.read_all(self.store, [self._mark_file(b) for b in there]), strict=True):
            if mark is not None:
                marks[block] = np.frombuffer(mark, dtype=np.uint8) if len(mark) == DIGEST_BYTES else self._mark(block)
        return marks

    def finished(self) -> npt.NDArray[np.bool_]:
        """Returns which blocks are finished, (blocks,) bool."""
        return np.asarray(self.digests().any(axis=1))

    def finished_rows(self) -> npt.NDArray[np.int64]:
        """Returns the row numbers of all finished blocks, ascending."""
        spans = [self.span(int(block)) for block in np.flatnonzero(self.finished())]
        return np.concatenate([np.arange(s.start, s.stop) for s in spans] or [np.zeros(0)]).astype(np.int64)

    def write(self, block: int, values: Mapping[str, Array], undefined: Collection[str] = ()) -> bool:
        """Writes a whole block and marks it finished: afterwards it is data, until then it is nothing.

        Every object is made only if there is none, and none is changed once it is marked: of several workers at the
        same block the first one wins. What a worker left that died before the mark is taken over if it is whole (the
        arrays of a block may then come from two tries: the same bytes on one kind of CPU, equal up to rounding
        elsewhere), else replaced. Numbers must be finite, but for the arrays named in `undefined`.

        Returns:
          False if the block was finished already; then nothing was changed.

        Raises:
          ValueError: An array is missing or unknown, has not the block's shape, or is not finite.
          StoreError: Storage gave back something else than was written.
        """
        written = self._checked(block, values, undefined)
        if self.is_finished(block):
            return False
        encoded = {name: self._encode(name, block, value) for name, value in written.items()}
        for name, data in encoded.items():
            objects.create(self.store, self._file(name, block), data)
        stored: dict[str, Array] = {}
        for name, data in encoded.items():
            try:
                self._require_file(name, block)
                stored[name] = self._stored_array(name, block)
            except DamagedBlockError:  # left by a power cut: it was never marked
                if self.is_finished(block):
                    return False
                objects.delete(self.store, self._file(name, block))
                objects.create(self.store, self._file(name, block), data)
                stored[name] = self._stored_array(name, block)
        self._require_same(block, encoded, written, stored)
        objects.flush(self.store, [self._file(name, block) for name in self.arrays])
        self._set_mark(block, _digest(stored))
        return True

    def _checked(self, block: int, values: Mapping[str, Array], undefined: Collection[str]) -> dict[str, Array]:
        """Returns the values as they are stored, or raises ValueError for what is no such block."""
        span = self.span(block)
        if set(values) != set(self.arrays):
            raise ValueError(
                f"{self.where}: block {block} came with {', '.join(sorted(values)) or 'nothing'}, expected "
                f"{', '.join(sorted(self.arrays))}. Give each of them and nothing else."
            )
        for name, array in self.arrays.items():
            expected = (span.stop - span.start, *array.shape[1:])
            if values[name].shape != expected:
                raise ValueError(
                    f"{self.where}: block {block} of {name!r} has shape {values[name].shape}, expected {expected}."
                )
        written = {name: np.ascontiguousarray(values[name], dtype=array.dtype) for name, array in self.arrays.items()}
        for name in sorted(set(written) - set(undefined)):
            lost = ~np.isfinite(written[name])
            if lost.any():
                row, *column = (int(i) for i in np.argwhere(lost)[0])
                at = f"row {span.start + row}" + "".join(f", column {c}" for c in column)
                raise ValueError(
                    f"{self.where}: block {block} of {name!r} is {written[name][row, *column]} in {at}, expected a "
                    "finite number. Nothing was stored."
                )
        return written

    def _encode(self, name: str, block: int, values: Array) -> bytes:
        """Returns the bytes of the one object that holds a block of an array."""
        array = self.arrays[name]
        memory = MemoryStore()
        alone = zarr.Array.from_dict(StorePath(memory, array.path), array.metadata.to_dict()).with_config(KEEP_EMPTY)
        alone[self.span(block)] = values
        data = objects.read(memory, self._file(name, block))
        if data is None:
            raise StoreError(f"{self.where}: {name!r} is not stored block by block. The store is damaged.")
        return data

    def _require_same(
        self, block: int, encoded: Mapping[str, bytes], written: Mapping[str, Array], stored: Mapping[str, Array]
    ) -> None:
        """Raises StoreError where the object is ours but its numbers are not."""
        for name, data in encoded.items():
            same = np.array_equal(_bits(stored[name]), _bits(written[name]))
            if not same and objects.read(self.store, self._file(name, block)) == data:
                raise StoreError(f"{self.where}: storage gave back other bytes than were written for block {block}.")

    def _set_mark(self, block: int, digest: bytes) -> None:
        key = self._mark_file(block)
        found = objects.read(self.store, key)
        if found is not None and not any(found):  # zeros or nothing, as a power cut may leave: no mark
            objects.delete(self.store, key)
        objects.create(self.store, key, digest)
        objects.flush(self.store, [key])

    def is_finished(self, block: int) -> bool:
        """Returns whether a block is finished now, whoever finished it. Cost: one small object."""
        return bool(self._mark(block).any())

    def forget(self, block: int) -> None:
        """Removes a block's data, then its mark, so that it is computed anew; a kill in between leaves it damaged."""
        for name in self.arrays:
            objects.delete(self.store, self._file(name, block))
        objects.delete(self.store, self._mark_file(block))

    def read(self, block: int) -> dict[str, Array]:
        """Returns the arrays of a finished block, checked against the ledger's sha256.

        Raises:
          UnfinishedStoreError: The block is not finished.
          DamagedBlockError: It is, but storage no longer holds what was written.
        """
        mark = self.require_finished(block)
        values = self._stored(block)
        if _digest(values) != mark.tobytes():
            raise self._damaged(block, "its sha256 is not the one in the ledger")
        return values

    def require_finished(self, block: int) -> Array:
        """Returns the mark of a finished block, its sha256. Raises UnfinishedStoreError if it is not finished now."""
        mark = self._mark(block)
        if not mark.any():
            raise UnfinishedStoreError(f"{self.where}: block {block} is not finished. Run the same command again.")
        return mark

    def _mark(self, block: int) -> Array:
        self.span(block)  # refuses a block that does not exist
        try:
            return np.asarray(self._ledger[block])
        except BAD_BYTES as error:
            raise self._damaged(block, f"its mark cannot be read ({self._mark_file(block)}: {error})") from error

    def _stored(self, block: int) -> dict[str, Array]:
        return {name: self._stored_array(name, block) for name in self.arrays}

    def _stored_array(self, name: str, block: int) -> Array:
        try:
            return np.asarray(self.arrays[name][self.span(block)])
        except BAD_BYTES as error:
            raise self._damaged(block, f"{name!r} cannot be read ({self._file(name, block)}: {error})") from error

    def _file(self, name: str, block: int) -> str:
        """Returns the key of the one file (a shard, or a chunk of a column) that holds a block of an array."""
        array = self.arrays[name]
        return "/".join([array.path, "c", str(block), *["0"] * (array.ndim - 1)])

    def _mark_file(self, block: int) -> str:
        return f"{self._ledger.path}/c/{block}/0"

    def _require_file(self, name: str, block: int) -> None:
        """Raises DamagedBlockError if the file is gone or empty: zarr would read the fill value."""
        size = stored_size(self.arrays[name].store, self._file(name, block))
        if size is None:
            raise self._damaged(block, f"the file of {name!r} is gone ({self._file(name, block)})")
        if size == 0:
            raise self._damaged(block, f"the file of {name!r} is empty ({self._file(name, block)})")

    def _damaged(self, block: int, why: str) -> DamagedBlockError:
        span = self.span(block)
        return DamagedBlockError(
            f"{self.where}: block {block} (rows {span.start} to {span.stop - 1}) is damaged: {why}. "
            f"`coar repair {self.where}` forgets it; then run the same command again to recompute it."
        )

    def check_present(self) -> None:
        """Raises DamagedBlockError if a finished block has lost a file. Cost: one look per file, no data is read."""
        finished = np.flatnonzero(self.finished())
        for name in self.arrays:
            for block in finished:
                self._require_file(name, int(block))

    def take(self, name: str, rows: Array, columns: slice | Array = slice(None)) -> Array:
        """Returns rows (by number; all finished) and columns of one array; bytes are checked by crc32c only.

        Raises:
          DamagedBlockError: A file is gone, empty or not what it was.
        """
        try:
            found = self._readers[name].take(as_slice(rows), columns)
        except BAD_BYTES as error:
            for block in np.unique(rows // self.block):
                self._stored(int(block))  # names the block
            raise DamagedBlockError(
                f"{self.where}: {name!r} cannot be read in rows {rows.min()} to {rows.max()}: {error}."
            ) from error
        for block in np.unique(rows // self.block):
            self._require_file(name, int(block))
        return found


def _array(group: zarr.Group, name: str, where: str) -> zarr.Array[Any]:
    try:
        found = group[name]
    except KeyError:
        found = None
    if not isinstance(found, zarr.Array):
        raise StoreError(f"{where}: the array {name!r} is missing. The store is damaged; run again into a new one.")
    array: zarr.Array[Any] = found.with_config(KEEP_EMPTY)
    return array


def as_slice(positions: npt.NDArray[np.intp]) -> slice | npt.NDArray[np.intp]:
    """Returns a run of positions as a slice, which zarr reads faster; other positions as they are."""
    if len(positions) and np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
        return slice(int(positions[0]), int(positions[0]) + len(positions))
    return positions


def _bits(values: Array) -> npt.NDArray[np.uint8]:
    """Returns the bytes of an array: NaN is equal to itself, and 0 is not -0."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _digest(values: Mapping[str, Array]) -> bytes:
    """Returns the sha256 of the arrays' names, dtypes, shapes and bytes."""
    hasher = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        hasher.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
        hasher.update(value.data)
    return hasher.digest()
