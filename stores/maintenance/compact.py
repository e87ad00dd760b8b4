"""Making copies of finished stores for readers of single rows and single columns; whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath

from stores.attributions import AttributionStore
from stores.blocks.blocks import KEEP_EMPTY, Blocks
from stores.blocks.copies import FOLDER, MARK, folder_of, group_metadata, read_mark, source_of
from stores.blocks.reading import stored_size
from stores.campaign import CampaignStore
from stores.errors import StoreError
from stores.format.groups import Location
from stores.format.layout import COLUMN, COPY_KINDS, ROW, SHARD_BYTES, Layout, copy_layout
from stores.opening import OpenStore, open_any
from stores.storage import objects

MEMORY = 2**30
SHARDS_IN_MEMORY = 8  # a shard as read, encoded, joined, read back, compared, and what zarr holds meanwhile
LEAST_MEMORY = 64 * 2**20

Told = Callable[[int, int], object]


class CopyError(StoreError, ValueError):
    """What was asked about copies cannot be done."""


@dataclass(frozen=True)
class MadeCopy:
    """A copy of a store: its kind (`row` or `column`), files and bytes; `made` is False if it was there before."""

    kind: str
    files: int
    bytes: int
    made: bool


def make_copies(
    location: Location,
    copies: Sequence[str] | None = None,
    *,
    memory: int = MEMORY,
    on_bytes: Told = lambda done, total: None,
) -> list[MadeCopy]:
    """Adds copies to a finished store, so that single rows or columns are read in a few milliseconds; returns them.

    The blocks are not changed. Their sha256 is checked first, and every file of a copy is read back and compared.
    Readers use a copy once it is complete: open the store again. A copy that is there is left as it is; what an earlier
    try left is written anew.

    Args:
      location: A campaign (of which `outputs` is copied) or attributions (`weights` and `stderr`).
      copies: `row` (all of one example's attributions, or of one keep-vector's outputs), `column` (all examples of one
        component, or all keep-vectors of one example), or both. None: `column` for a campaign, both for attributions.
      memory: Budget in bytes.
      on_bytes: Called with the bytes done and in all.

    Cost: reads the store once to check it, and once per copy; a copy is as large as what it is made from.

    Raises:
      CopyError: A kind of copy is unknown, `memory` is below 64 MiB, or the disk has not enough room.
      UnfinishedStoreError: The store is not finished.
      DamagedBlockError: A block is damaged.
      StoreError: Storage gave back something else than was written.
    """
    store = _open_finished(location)
    blocks, names = store.blocks, copied_arrays(store)
    kinds = _checked_kinds(copies, (COLUMN,) if isinstance(store, CampaignStore) else COPY_KINDS)
    if memory < LEAST_MEMORY:
        raise CopyError(f"memory is {memory:,} bytes, expected at least {LEAST_MEMORY:,}.")
    _sweep(blocks)
    there = {kind: mark for kind in kinds if (mark := read_mark(blocks, kind)) is not None}
    size = sum(_bytes(blocks.arrays[name]) for name in names)
    missing = [kind for kind in kinds if kind not in there]
    _require_room(blocks, size * len(missing))
    progress = _Progress(on_bytes, _all_bytes(blocks) + size * len(missing) if missing else 0)
    if missing:
        for block in range(len(blocks)):
            progress.add(sum(value.nbytes for value in blocks.read(block).values()))
    shard_bytes = min(SHARD_BYTES, memory // SHARDS_IN_MEMORY)
    for kind in missing:
        there[kind] = _make(blocks, kind, names, shard_bytes, progress)
    return [MadeCopy(kind, len(there[kind]["files"]), int(there[kind]["bytes"]), kind in missing) for kind in kinds]


def remove_copies(location: Location) -> int:
    """Removes all copies of a store, finished or not, and returns how many there were. The blocks are not changed."""
    blocks = _open_finished(location).blocks
    found = objects.names(blocks.store, FOLDER)
    count = 0
    for name in found:
        if name.partition("-")[0] in COPY_KINDS:
            _remove(blocks, f"{FOLDER}/{name}")
            count += 1
    return count


def copied_arrays(store: CampaignStore | AttributionStore) -> tuple[str, ...]:
    """Returns the names of the matrices that copies are made of."""
    return ("outputs",) if isinstance(store, CampaignStore) else ("weights", "stderr")


def _open_finished(location: Location) -> OpenStore:
    store = open_any(location, "r+")
    store.blocks.check_present()
    if isinstance(store, CampaignStore):
        store.require_complete()
    else:
        AttributionStore.open(location)  # refuses an unfinished one
    return store


def _checked_kinds(copies: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    asked = list(default if copies is None else [copies] if isinstance(copies, str) else copies)
    for kind in asked:
        if kind not in COPY_KINDS:
            raise CopyError(f"No kind of copy {kind!r}; kinds are {ROW} and {COLUMN}.")
    if not asked:
        raise CopyError(f"copies is empty, expected {ROW}, {COLUMN} or both.")
    return [kind for kind in COPY_KINDS if kind in asked]


def _make(blocks: Blocks, kind: str, names: Sequence[str], shard_bytes: int, progress: _Progress) -> dict[str, Any]:
    """Makes the copy of a kind and returns its mark."""
    source = source_of(blocks)
    folder = folder_of(kind, source)
    files: dict[str, str] = {}
    arrays: dict[str, str] = {}
    size = 0
    for name in names:
        original = blocks.arrays[name]
        layout = copy_layout(kind, original.shape, original.dtype.itemsize, shard_bytes)
        copy = _array(blocks, f"{folder}/{name}", original, layout)
        arrays[name] = hashlib.sha256(objects.read(blocks.store, f"{copy.path}/zarr.json") or b"").hexdigest()
        for rows, columns in layout.regions(original.shape):
            values = blocks.take(name, np.arange(rows.start, rows.stop), columns)
            key = f"{copy.path}/c/{rows.start // layout.shard[0]}/{columns.start // layout.shard[1]}"
            data = _encode(copy, key, (rows, columns), values)
            objects.replace(blocks.store, key, data)
            if objects.read(blocks.store, key) != data:
                raise StoreError(f"{blocks.where}: storage gave back other bytes than were written to {key}.")
            files[key] = hashlib.sha256(data).hexdigest()
            size += len(data)
            progress.add(values.nbytes)
    lost = [key for key in files if not stored_size(blocks.store, key)]
    if lost:
        raise StoreError(f"{blocks.where}: {lost[0]} is gone again. Is another program making or removing copies here?")
    objects.flush(blocks.store, [*files, *(f"{folder}/{name}/zarr.json" for name in names)])
    mark = {"source": source, "files": files, "arrays": arrays, "bytes": size}
    objects.create(blocks.store, f"{FOLDER}/zarr.json", objects.to_json(group_metadata({})))
    objects.replace(blocks.store, f"{folder}/{MARK}", objects.to_json(group_metadata(mark)))
    objects.flush(blocks.store, [f"{FOLDER}/zarr.json", f"{folder}/{MARK}"])
    return mark


def _array(blocks: Blocks, path: str, original: zarr.Array[Any], layout: Layout) -> zarr.Array[Any]:
    """Returns the array of a copy, made unless it is there; what an earlier try left is replaced as it is written.

    Two programs that make the same copy at once write the same bytes to the same places, and neither removes any.
    """
    memory = MemoryStore()
    _new(memory, path, original, layout)
    key = f"{path}/zarr.json"
    metadata, here = objects.read(memory, key), objects.read(blocks.store, key)
    if metadata is None:
        raise StoreError(f"zarr wrote another object than {key}.")
    if here is not None and here != metadata:  # with another memory budget, say
        sync(blocks.store.delete_dir(path))
    objects.create(blocks.store, key, metadata)
    return zarr.open_array(blocks.store, path=path, mode="r+")


def _new(store: Store, path: str, original: zarr.Array[Any], layout: Layout) -> zarr.Array[Any]:
    metadata: Any = original.metadata
    array: zarr.Array[Any] = zarr.create_array(
        store,
        name=path,
        shape=original.shape,
        dtype=original.dtype,
        chunks=layout.inner,
        shards=layout.shard,
        compressors=[Crc32cCodec()],
        fill_value=original.fill_value,
        dimension_names=metadata.dimension_names,
        config=KEEP_EMPTY,
    )
    return array


def _encode(copy: zarr.Array[Any], key: str, region: tuple[slice, slice], values: npt.NDArray[Any]) -> bytes:
    """Returns the bytes of one shard: written elsewhere first, so that it is put in its place in one step."""
    memory = MemoryStore()
    alone = zarr.Array.from_dict(StorePath(memory, copy.path), copy.metadata.to_dict()).with_config(KEEP_EMPTY)
    alone[region] = values
    data = objects.read(memory, key)
    if data is None:
        raise StoreError(f"zarr wrote another object than {key}.")
    return data


def _sweep(blocks: Blocks) -> None:
    """Removes copies of what the store held before a repair: nobody reads them any more."""
    current = {folder_of(kind, source_of(blocks)) for kind in COPY_KINDS}
    for name in objects.names(blocks.store, FOLDER):
        if name.partition("-")[0] in COPY_KINDS and f"{FOLDER}/{name}" not in current:
            _remove(blocks, f"{FOLDER}/{name}")


def _remove(blocks: Blocks, folder: str) -> None:
    objects.delete(blocks.store, f"{folder}/{MARK}")  # first: without it nobody begins to read
    sync(blocks.store.delete_dir(folder))


def _bytes(array: zarr.Array[Any]) -> int:
    return int(array.size) * int(array.dtype.itemsize)


def _all_bytes(blocks: Blocks) -> int:
    return sum(_bytes(array) for array in blocks.arrays.values())


def _require_room(blocks: Blocks, needed: int) -> None:
    if not isinstance(blocks.store, LocalStore):
        return
    free = shutil.disk_usage(blocks.store.root).free
    if needed > free:
        raise CopyError(
            f"{blocks.where}: the copies need {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free there. "
            "Make room, or ask for one copy only."
        )


class _Progress:
    def __init__(self, told: Told, total: int) -> None:
        self._told, self._total, self._done = told, total, 0

    def add(self, size: int) -> None:
        """Tells that so many bytes more are done."""
        self._done += size
        self._told(self._done, self._total)
