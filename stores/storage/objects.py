"""Single objects of a store, below zarr's arrays: read, create if absent, replace, delete, list, wait for the disk.

Keys may come from the store's own book-keeping, which anybody may have written: none may lead out of the store.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.buffer.cpu import Buffer
from zarr.core.sync import sync
from zarr.storage import LocalStore

from stores.errors import StoreError

AT_ONCE = 32  # small objects that are read at the same time
FOREIGN = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory", ".localized"}
FOREIGN_BEGINNINGS = ("._", ".nfs", ".fuse_hidden", ".smb", ".sync-", ".Spotlight-", ".Trashes", ".fseventsd")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def read(store: Store, key: str) -> bytes | None:
    """Returns an object's bytes, or None if it is not there."""
    with _named(store, key):
        found = sync(store.get(key, prototype=default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def read_all(store: Store, keys: Sequence[str]) -> list[bytes | None]:
    """Returns the bytes of many small objects, None for what is not there; several are on their way at once."""

    async def one(key: str, turn: asyncio.Semaphore) -> bytes | None:
        async with turn:
            found = await store.get(key, prototype=default_buffer_prototype())
        return None if found is None else found.to_bytes()

    async def collect() -> list[bytes | None]:
        turn = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(one(key, turn) for key in keys))

    return sync(collect())


def create(store: Store, key: str, data: bytes) -> None:
    """Makes an object unless there is one: of several writers the first one wins, the others change nothing.

    Who won is seen by reading. A path that zarr would write in two steps is never seen half-written.
    """
    with _named(store, key):
        sync(store.set_if_not_exists(key, Buffer.from_bytes(data)))


def replace(store: Store, key: str, data: bytes) -> None:
    """Makes an object, or puts another one in its place."""
    with _named(store, key):
        sync(store.set(key, Buffer.from_bytes(data)))


def delete(store: Store, key: str) -> None:
    """Removes an object; nothing happens if there is none."""
    with _named(store, key):
        sync(store.delete(key))


def names(store: Store, prefix: str) -> list[str]:
    """Returns the names of the objects directly below a prefix, in order.

    Without what a killed write leaves, and what desktops and file systems put into any folder.
    """

    async def collect() -> list[str]:
        try:
            return [name async for name in store.list_dir(prefix)]
        except FileNotFoundError:
            return []

    return sorted(name for name in sync(collect()) if not name.endswith(".partial") and not is_foreign(name))


def is_foreign(name: str) -> bool:
    """Returns whether a file is none of a store's, but one that macOS, Windows or NFS puts into any folder."""
    return name in FOREIGN or name.startswith(FOREIGN_BEGINNINGS)


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Returns the JSON object at a key; None if there is none, or none that can be read: book-keeping, not data."""
    data = read(store, key)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def to_json(value: Any) -> bytes:
    """Returns a value as indented JSON, for people who look into a store."""
    return json.dumps(value, indent=1, sort_keys=True).encode()


def flush(store: Store, keys: Iterable[str]) -> None:
    """Waits until objects and their names are on the disk, where the store is a local directory.

    After a power cut, no mark may stand without its data. Object storage answers when it is done.
    """
    if not isinstance(store, LocalStore):
        return
    folders = set()
    for key in keys:
        path = Path(store.root) / key
        _flush(path)
        folders |= {path.parent, path.parent.parent}  # zarr makes folders on the way
    for folder in sorted(folders, reverse=True):
        _flush(folder)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot, and need not, flush folders
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _named(store: Store, key: str) -> Iterator[None]:
    """Refuses a key that leads out of the store, and names the file where the system's error does not."""
    if any(part in ("", ".", "..") for part in key.split("/")) or set(key) & set("\\:\0"):
        raise StoreError(
            f"{store}: the key {key!r} leads out of the store. Its book-keeping was changed: remove its folder `work`."
        )
    try:
        yield
    except OSError as error:
        if isinstance(store, LocalStore) and error.errno is not None and error.filename is None:
            error.filename = str(Path(store.root) / key)
        if error.errno in NO_ROOM:
            error.add_note("Finished blocks stay. Make room there, then run the same command again.")
        raise
