"""Attributions as one .npz file without pickle: written and read as a stream, whatever their size.

Arrays: `weights` and `stderr` (examples, components) float32, `bias` (examples,), `quality_<name>` (examples,),
`example_<column>` and `component_<column>` one per column of the tables (text as fixed-width unicode), and `header`,
one JSON text: what was estimated, how and from what.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from coar.interchange.errors import InterchangeError
from coar.interchange.slabs import slabs
from stores import AttributionStore

Array = npt.NDArray[Any]

HEADER = "header"
_SAME_TIME = (1980, 1, 1, 0, 0, 0)  # of every member: equal attributions give equal files
_KEPT = ("identity", "spec", "index", "quality")  # of a store's attributes
_DAMAGE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)  # what a zip raises


class NpzWriter:
    """A context manager that writes arrays to an .npz file, one after the other."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def write(self, name: str, values: Array) -> None:
        """Adds an array; text of any kind becomes fixed-width unicode, since objects would need pickle."""
        text = values.dtype.kind in "OUT"
        whole = np.array([str(value) for value in values], dtype=np.str_) if text and values.ndim else values
        self.stream(name, whole.shape, whole.dtype, [whole])

    def stream(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[Array]) -> None:
        """Adds an array of this shape whose rows come in parts, in order."""
        member = zipfile.ZipInfo(f"{name}.npy", date_time=_SAME_TIME)
        with self._zip.open(member, "w", force_zip64=True) as file:
            facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, facts)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype=dtype).tobytes())


def write_npz(store: AttributionStore, path: Path) -> None:
    """Writes finished attributions to an .npz file. Cost: one pass over weights, one over standard errors."""
    shape = (store.example_count, store.component_count)
    float32 = np.dtype(np.float32)
    spans = list(slabs(store, 4 * store.component_count))
    with NpzWriter(path) as file:
        header = {name: store.header[name] for name in _KEPT if name in store.header}
        file.write(HEADER, np.array(json.dumps(header, sort_keys=True)))
        for column, values in store.examples.items():
            file.write(f"example_{column}", values)
        for column, values in store.components.items():
            file.write(f"component_{column}", values)
        file.write("bias", store.bias[:])
        for name, values in store.quality.items():
            file.write(f"quality_{name}", values)
        file.stream("weights", shape, float32, (store.weights[span] for span in spans))
        file.stream("stderr", shape, float32, (store.stderr[span] for span in spans))


class NpzRows:
    """The rows of one array of an .npz file, read where they lie: `take(span)` gives (rows, ...).

    Raises InterchangeError where the file is cut off or its bytes are not what they were.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str) -> None:
        self._where = f"{path}: {name}.npy"
        try:
            self._file: IO[bytes] = archive.open(f"{name}.npy")
        except (KeyError, *_DAMAGE) as error:
            raise self._unreadable(str(error)) from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        try:
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, by_columns, self.dtype = read(self._file)
        except _DAMAGE as error:
            raise self._unreadable(str(error)) from error
        if self.dtype.kind != "f" or by_columns:
            order = "by columns" if by_columns else "row by row"
            raise self._unreadable(f"it is {self.dtype}, {order}, expected floating-point numbers, row by row")
        self._first = self._file.tell()

    def take(self, span: slice) -> Array:
        """Returns some rows."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        start, size = self._first + span.start * width, (span.stop - span.start) * width
        try:
            if self._file.tell() != start:  # read in order, so that the zip's checksum is looked at
                self._file.seek(start)
            found = self._file.read(size)
        except _DAMAGE as error:
            raise self._unreadable(str(error)) from error
        if len(found) != size:
            raise self._unreadable(f"it ends before row {span.stop - 1}")
        return np.frombuffer(found, dtype=self.dtype).reshape(span.stop - span.start, *self.shape[1:])

    def close(self) -> None:
        """Closes the array's own view of the file: the file stays open as long as one of them is."""
        self._file.close()

    def _unreadable(self, why: str) -> InterchangeError:
        return InterchangeError(f"{self._where} cannot be read: {why.rstrip('.')}. Export it again.")
