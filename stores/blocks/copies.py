"""Copies of a finished store's matrices in another order, for whoever reads single rows or single columns.

A copy is derived data: the blocks stay the truth. It is a zarr group, `copies/<kind>-<digits of its source>/`, whose
metadata is written last and names the ledger it was made from: that is its mark. Only a marked copy of the very ledger
a store has now is read; in every other case the blocks are. The root's consolidated metadata does not name copies,
because the root is written once: readers that know nothing of copies see the store as it was.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import StorePath

from stores.blocks.blocks import Blocks
from stores.blocks.reading import BAD_BYTES, ArrayReader
from stores.format.layout import COPY_KINDS, Layout, Positions
from stores.format.root import node_problem
from stores.storage import objects

FOLDER = "copies"
MARK = "zarr.json"
WORTH_IT = 2.0  # a copy is read where it costs at most this part of reading the blocks


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a zarr group with these attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def source_of(blocks: Blocks) -> str:
    """Returns what a copy of these blocks is bound to: the sha256 (hex) of the ledger."""
    return hashlib.sha256(blocks.digests().tobytes()).hexdigest()


def folder_of(kind: str, source: str) -> str:
    """Returns where the copy of a kind lies in the store."""
    return f"{FOLDER}/{kind}-{source[:16]}"


def read_mark(blocks: Blocks, kind: str) -> dict[str, Any] | None:
    """Returns the mark of a finished copy of the store as it is now: `source`, `files` with their sha256; or None."""
    source = source_of(blocks)
    folder = folder_of(kind, source)
    mark = (objects.read_json(blocks.store, f"{folder}/{MARK}") or {}).get("attributes")
    if not isinstance(mark, dict) or mark.get("source") != source or not isinstance(mark.get("bytes"), int):
        return None
    files = mark.get("files")
    arrays = mark.get("arrays")
    inside = (
        isinstance(files, dict)
        and isinstance(arrays, dict)
        and all(
            isinstance(digest, str) and key.startswith(f"{folder}/") and ".." not in key
            for key, digest in files.items()
        )
    )
    return mark if inside else None  # whoever wrote the mark, nothing outside the copy is touched


def damaged_files(blocks: Blocks) -> list[str]:
    """Returns the keys of files of finished copies that are gone or no longer what was written; reads them all."""
    bad = []
    for kind in COPY_KINDS:
        mark = read_mark(blocks, kind) or {"files": {}, "arrays": {}}
        folder = folder_of(kind, source_of(blocks))
        metadata = {f"{folder}/{name}/zarr.json": digest for name, digest in mark["arrays"].items()}
        for key, digest in (metadata | mark["files"]).items():
            data = objects.read(blocks.store, key)
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                bad.append(key)
    return bad


class Copies:
    """The copies that an open store has, if it has any. Looks for them once, when they are first needed.

    A store that is open for writing, or not finished, has none.
    """

    def __init__(self, blocks: Blocks, names: Iterable[str]) -> None:
        self._blocks = blocks
        self._names = tuple(names)

    @cached_property
    def _readers(self) -> dict[str, list[ArrayReader]]:
        """The copies of each matrix."""
        found: dict[str, list[ArrayReader]] = {name: [] for name in self._names}
        writable = not self._blocks.store.read_only
        if writable or not self._blocks.finished().all():
            return found
        source = source_of(self._blocks)
        for kind in COPY_KINDS:
            mark = read_mark(self._blocks, kind)
            if mark is None:
                continue
            for name in self._names:
                array = self._open(f"{folder_of(kind, source)}/{name}", name, mark)
                if array is not None:
                    found[name].append(ArrayReader(array))
        return found

    def _open(self, path: str, name: str, mark: Mapping[str, Any]) -> zarr.Array[Any] | None:
        data = objects.read(self._blocks.store, f"{path}/zarr.json") or b""
        try:
            if hashlib.sha256(data).hexdigest() != mark["arrays"][name]:  # a changed shape would mix up the numbers
                raise ValueError("its metadata are not what was written")
            problem = node_problem(path, json.loads(data))
            if problem is not None:
                raise ValueError(problem)
            array = zarr.Array.from_dict(StorePath(self._blocks.store, path), json.loads(data))
        except (*BAD_BYTES, KeyError, TypeError) as error:
            self._warn(path, str(error))
            return None
        original = self._blocks.arrays[name]
        if (array.shape, array.dtype) != (original.shape, original.dtype):
            self._warn(path, f"it is {array.dtype} of shape {array.shape}")
            return None
        return array

    def take(self, name: str, rows: Positions, columns: Positions) -> npt.NDArray[Any] | None:
        """Returns rows and columns of a matrix from a copy; None where there is none, or the blocks are as good."""
        readers = self._readers.get(name)
        if not readers:
            return None
        original = self._blocks.arrays[name]
        shape = original.shape
        costs = [Layout.of(reader.array).seconds(shape, rows, columns) for reader in readers]
        best = int(np.argmin(costs))
        if costs[best] * WORTH_IT > Layout.of(original).seconds(shape, rows, columns):
            return None
        reader = readers[best]
        try:
            values = reader.take(rows, columns)
            lost = reader.lost_file(rows, columns)
        except BAD_BYTES as error:
            values, lost = np.zeros(0), str(error)
        if lost is None:
            return values
        readers.remove(reader)  # the blocks are the truth
        self._warn(reader.array.path, lost)
        return None

    def _warn(self, path: str, why: str) -> None:
        warnings.warn(
            f"{self._blocks.where}: the copy {path} is damaged ({why}); the blocks it was made from are read instead. "
            "Run `coar compact` with --remove, then again without, to make it anew.",
            stacklevel=2,
        )
