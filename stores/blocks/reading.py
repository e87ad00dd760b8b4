"""Reading parts of an array: by tensorstore where it is installed and the files are local, else by zarr.

Both give the same numbers. A file that is not there reads as the fill value in both, so whoever reads must look for it;
`ArrayReader.lost_file` does. Writing is left to zarr.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from stores.errors import StoreError
from stores.format.layout import Layout, Positions

SWITCH = "STORES_FAST_READ"
BAD_BYTES = (ValueError, RuntimeError, OSError)  # what zarr, its codecs and tensorstore raise for damaged files
EVERYTHING = slice(None)

_process: int | None = None  # where tensorstore was first used: its threads do not survive a fork


class ArrayReader:
    """Reads parts of one stored array, the fastest way there is here."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self.array = array
        self._fast: Any = None
        self._opened = False

    def take(self, rows: Positions, columns: Positions = EVERYTHING) -> npt.NDArray[Any]:
        """Returns rows and columns (every combination) of the array; of a 1-D array, rows. Checks crc32c only."""
        selection: Any = (rows, columns)[: self.array.ndim]
        fast = self._tensorstore()
        if fast is not None:
            try:
                return np.asarray(fast.oindex[selection].read().result())
            except (*BAD_BYTES, IndexError):
                pass  # zarr reads it, or says what is wrong with it as it always does
        return np.asarray(self.array.oindex[selection])

    def lost_file(self, rows: Positions, columns: Positions = EVERYTHING) -> str | None:
        """Returns the key of a file that holds some of these rows and columns, but is gone or empty; None if none is.

        Cost: one look per file.
        """
        layout = Layout.of(self.array)
        for i, j in layout.files(self.array.shape, rows, columns):
            key = f"{self.array.path}/c/{i}/{j}"
            if not stored_size(self.array.store, key):
                return key
        return None

    def _tensorstore(self) -> Any:
        global _process
        store = self.array.store
        if not isinstance(store, LocalStore) or not fast_reading():
            return None
        if _process not in (None, os.getpid()):
            return None
        if not self._opened:
            self._opened = True
            tensorstore = importlib.import_module("tensorstore")
            _process = os.getpid()
            files = {"driver": "file", "path": f"{store.root.absolute() / self.array.path}/"}
            try:
                # zarr's own view of the array: the file beside the chunks may have been changed since
                known = json.loads(
                    self.array.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
                )
                spec = {"driver": "zarr3", "kvstore": files, "metadata": known}
                opened = tensorstore.open(spec, open=True, read=True, assume_metadata=True)
                self._fast = opened.result()
            except BAD_BYTES:  # an array of a kind that it does not know
                self._fast = None
        return self._fast


def fast_reading() -> bool:
    """Returns whether local files are read by tensorstore: if it is installed, unless STORES_FAST_READ is 0.

    Raises:
      StoreError: STORES_FAST_READ is neither 0 nor 1.
    """
    asked = os.environ.get(SWITCH, "1")
    if asked not in ("0", "1"):
        raise StoreError(f"{SWITCH} is {asked!r}, expected 1 (read by tensorstore if it is installed) or 0 (by zarr).")
    return asked == "1" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("tensorstore") is not None


def stored_size(store: Store, key: str) -> int | None:
    """Returns the size of an object in bytes, or None if it is not there."""
    try:
        if isinstance(store, LocalStore):  # the same without the detour over zarr's event loop
            return os.stat(store.root / key).st_size
        return int(sync(store.getsize(key)))
    except FileNotFoundError:
        return None
