"""Format version, dimension names, content hashes, and opening a group or saying exactly why that cannot be done."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from stores.errors import StoreError, StoreExistsError, StoreNotFoundError, StoreUnreadableError
from stores.format.root import FORMAT_VERSION as FORMAT_VERSION
from stores.format.root import require_sound, seal
from stores.storage import creating, objects
from stores.storage.drafts import draft_of, drafts_of
from stores.storage.places import Location as Location
from stores.storage.places import describe, resolve
from stores.storage.redact import redact

KEEP_ROWS = "keep_rows"
KEEP_BYTES = "keep_bytes"
EXAMPLES = "examples"
COMPONENTS = "components"
BLOCKS = "blocks"
DIGEST = "digest_bytes"

Columns = Mapping[str, npt.NDArray[Any]]


def describe_location(location: Location) -> str:
    """Returns a location as users know it: a path, a URL without credentials, or the name of a zarr store object."""
    return describe(location)


def _is_empty(place: Path | Store) -> bool:
    """Returns whether nothing is at this place; an empty directory counts as nothing, and so does book-keeping."""
    if isinstance(place, Store):
        return creating.is_empty(place)
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def _open(place: Path | Store, mode: str = "r") -> zarr.Group | None:
    try:
        return zarr.open_group(place, mode=mode)  # type: ignore[arg-type]
    except FileNotFoundError:
        return None


def open_group(location: Location, kind: str, mode: str = "r") -> zarr.Group:
    """Returns the group of a store of this kind (mode `r` or `r+`). Mutates nothing.

    Raises:
      StoreNotFoundError: Nothing is there.
      StoreUnreadableError: Something else is there: not a group, damaged metadata, another kind or format version.
    """
    if mode not in ("r", "r+"):  # zarr's others would make or empty a store
        raise ValueError(f"mode is {mode!r}, expected 'r' (read) or 'r+' (read and write).")
    where, place = describe_location(location), resolve(location)
    if isinstance(place, Store) and place.read_only and mode != "r":
        raise StoreError(f"{where} is a store object for reading only. Give one that can be written, or a path.")
    if _is_empty(place):
        raise StoreNotFoundError(f"No {kind} store at {where}: nothing is there. Check the path, or make one first.")
    if isinstance(place, Path) and not place.is_dir():
        raise StoreUnreadableError(f"{where} is a file, expected the directory of a {kind} store. Check the path.")
    try:
        require_sound(place if isinstance(place, Store) else LocalStore(place, read_only=True), kind, mode, where)
        group = _open(place, mode)
    except (PermissionError, StoreError):
        raise
    except Exception as error:  # zarr and JSON raise many types for damaged metadata
        raise StoreUnreadableError(
            f"{where} cannot be read as a {kind} store: {type(error).__name__}: {redact(str(error))}. Its metadata is "
            "damaged or it was not written by this toolkit; restore it from a copy, or delete it and run again."
        ) from (error if isinstance(place, Path) else None)  # a library's text may name credentials
    if group is None:
        raise StoreUnreadableError(f"{where} exists but is no {kind} store: it has no zarr.json. Check the path.")
    if mode == "r+" and isinstance(place, Store):
        creating.require_create_if_absent(place, where)
    return group


def create_group(location: Location, fill: Callable[[zarr.Group], None]) -> None:
    """Makes a group at `location`, filled by `fill`, in one step: a reader sees the whole of it or nothing.

    Raises:
      StoreExistsError: Something is there already.
    """
    where, place = describe_location(location), resolve(location)
    if not _is_empty(place):
        raise StoreExistsError(f"There is something at {where} already. Choose another place or remove it.")
    if isinstance(place, Store):
        made = MemoryStore()
        fill(zarr.open_group(made, mode="w"))
        _consolidate(made)
        creating.create_in(place, made, where)
    else:
        _create_folder(place, where, fill)


def _create_folder(path: Path, where: str, fill: Callable[[zarr.Group], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        fill(zarr.open_group(str(draft), mode="w"))
        _consolidate(str(draft))
        files = [file.relative_to(draft).as_posix() for file in draft.rglob("*") if file.is_file()]
        objects.flush(LocalStore(draft), files)
        os.rename(draft, path)  # atomic; refuses a non-empty directory that appeared meanwhile
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, Exception) and not _is_empty(path):
            raise StoreExistsError(f"Something appeared at {where} meanwhile. Choose another path.") from error
        raise
    objects.flush(LocalStore(path), ["zarr.json"])  # and the new name
    for leftover in drafts_of(path):
        shutil.rmtree(leftover, ignore_errors=True)  # of a program that was killed; a live one has lost the race


def _consolidate(target: str | Store) -> None:
    """Lets `xarray.open_zarr` read all metadata in one go, without its warning about doing otherwise; seals them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: consolidated metadata is not part of the v3 specification yet
        zarr.consolidate_metadata(target)
    seal(LocalStore(target) if isinstance(target, str) else target)


def write_columns(group: zarr.Group, name: str, dimension: str, columns: Columns) -> None:
    """Adds one 1-D array per column to the sub-group `name`; text is stored as variable-length UTF-8."""
    table = group.require_group(name)
    for column, values in columns.items():
        text = values.dtype.kind in "UOT"
        array = table.create_array(
            column,
            shape=values.shape,
            dtype=str if text else values.dtype,
            chunks=(max(1, len(values)),),
            compressors=[ZstdCodec(), Crc32cCodec()],  # a flipped bit is an error when read, not a label
            dimension_names=(dimension,),
            config={"write_empty_chunks": True},
        )
        if len(values):
            array[:] = values.astype(object) if text else values


def read_columns(group: zarr.Group, name: str) -> dict[str, npt.NDArray[Any]]:
    """Returns the columns of a table written by `write_columns`, in name order; text as numpy object arrays."""
    table = group[name]
    if not isinstance(table, zarr.Group):
        raise StoreUnreadableError(f"{group.store_path}: {name!r} is no table. The store is damaged.")
    columns: dict[str, npt.NDArray[Any]] = {}
    for column, array in sorted(table.arrays()):
        values = read_column(array, f"{group.store_path}: the column {name}/{column} is damaged")
        columns[column] = values.astype(object) if values.dtype.kind == "T" else values
    return columns


def read_column(array: zarr.Array[Any], what: str) -> npt.NDArray[Any]:
    """Returns a column whole. Raises StoreUnreadableError, which begins with `what`, if it is damaged."""
    advice = "Restore the store from a copy, or run again into a new one."
    try:
        values = np.asarray(array[:])
        if len(values):
            sync(array.store.getsize(f"{array.path}/c/0"))
    except FileNotFoundError as error:  # zarr reads a lost file as zeros, without a word
        raise StoreUnreadableError(f"{what}: its file is gone. {advice}") from error
    except (ValueError, RuntimeError, OSError, MemoryError) as error:  # noise may name any size
        raise StoreUnreadableError(f"{what}: {error}. {advice}") from error
    return values
