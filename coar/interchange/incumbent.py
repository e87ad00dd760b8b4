"""The published code's folder of a campaign: `masks.npy`, `<split>_margins.npy` and `_completed.npy`, checked.

Layout (MadryLab/modelcomponents, `initialize_store.py`, `make_dataset.py`, `ndm_utils.py`): three memory-mapped
arrays with one row per ablated model, made full of zeros and filled in any order by many jobs: `masks` (rows,
components) bool, **True = kept**; `test_margins` or `val_margins` (rows, examples) float16; `_completed` (rows,) bool,
set last. A row that no job has filled is all zeros, which looks like data: every component ablated, every margin zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ablate.errors import UnknownNameError
from coar.interchange.errors import InterchangeError

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Meaning = Literal["kept", "ablated"]

MASKS, COMPLETED, MARGINS = "masks.npy", "_completed.npy", "_margins.npy"
CHUNK_BYTES = 32 * 2**20
_SIGMAS = 5  # how far a share of ablated components may be off before it is another one


@dataclass(frozen=True)
class MarginFolder:
    """A folder whose arrays fit together. Only rows that are marked completed are ever read.

    Attributes:
      margins: The name of the file of margins.
      rows: The completed rows, ascending.
      rows_in_files: How many rows the files have room for.
      components, examples: The other lengths.
      all_completed: Whether there was no `_completed.npy`, and all rows count as completed because the user said so.
      kept: The positions of the examples that are read; None: all.
    """

    path: Path
    margins: str
    rows: npt.NDArray[np.int64]
    rows_in_files: int
    components: int
    examples: int
    all_completed: bool
    kept: npt.NDArray[np.int64] | None = None

    @classmethod
    def open(cls, path: Path, margins: str | None, assume_completed: bool) -> MarginFolder:
        """Returns the folder, or raises InterchangeError with all that does not fit."""
        name = _margins_name(path, margins)
        files = [MASKS, name]
        marked = (path / COMPLETED).exists()
        if not marked and not assume_completed:
            raise InterchangeError(
                f"{path} has no {COMPLETED}, which says which rows were computed. Restore it; or, if you know that "
                "all of them were, pass assume_completed=True (`--assume-completed`)."
            )
        shapes = {file: _checked(path / file, 2, "b" if file == MASKS else "f").shape for file in files}
        if marked:
            shapes[COMPLETED] = _checked(path / COMPLETED, 1, "b").shape
        lengths = {file: shape[0] for file, shape in shapes.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{file} {length}" for file, length in lengths.items())
            raise InterchangeError(
                f"{path}: the files have different numbers of rows: {listed}. Give those of one run."
            )
        count = lengths[MASKS]
        completed = np.asarray(_memmap(path / COMPLETED)) if marked else np.ones(count, dtype=np.bool_)
        rows = np.flatnonzero(completed)
        if not len(rows):
            raise InterchangeError(
                f"{path}: none of {count} rows is completed ({COMPLETED}). There is nothing to import."
            )
        return cls(path, name, rows, count, shapes[MASKS][1], shapes[name][1], not marked)

    @property
    def files(self) -> dict[str, str]:
        """The sha256 (hex) of each file that is read. Cost: reads them all."""
        names = [MASKS, self.margins, *([] if self.all_completed else [COMPLETED])]
        found = {}
        for name in names:
            with (self.path / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def take(self, rows: npt.NDArray[np.int64]) -> tuple[Bools, npt.NDArray[np.float32]]:
        """Returns (masks as the file has them, margins) of some rows. The files are mapped anew each time, so that
        what was read before does not stay in memory.
        """
        masks = np.asarray(_memmap(self.path / MASKS)[rows])
        with np.errstate(over="ignore"):  # float64 that float32 cannot hold: found as infinite, and named
            margins = np.asarray(_memmap(self.path / self.margins)[rows]).astype(np.float32)
        if self.kept is not None:
            margins = margins[:, self.kept]
        return masks, margins

    def chunks(self) -> Iterator[tuple[npt.NDArray[np.int64], Bools, npt.NDArray[np.float32]]]:
        """Yields (rows, masks, margins) of all completed rows, in a bounded memory."""
        step = max(1, CHUNK_BYTES // (self.components + 8 * self.examples))
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            yield rows, *self.take(rows)

    def without_nan(self, on_nan: Literal["drop"] | None) -> MarginFolder:
        """Returns the folder without the examples that have a margin which is not finite in a completed row.

        Cost: reads the files once.

        Raises:
          InterchangeError: There are some and `on_nan` is not "drop", or there is no other example.
        """
        lost, first = np.zeros(self.examples, dtype=np.bool_), ""
        for rows, _, margins in self.chunks():
            found = np.argwhere(~np.isfinite(margins))
            if len(found):
                row, example = (int(i) for i in found[0])
                first = first or f"row {rows[row]}, example {example} is {margins[row, example]}"
                lost[found[:, 1]] = True
        if not first:
            return self
        count = int(lost.sum())
        if on_nan != "drop" or count == self.examples:
            which = "1 example has" if count == 1 else f"{count:,} examples have"
            leave = (
                "pass on_nan='drop' (`--on-nan drop`) to leave these examples out, or " if count < self.examples else ""
            )
            raise InterchangeError(
                f"{self.path / self.margins}: {first}, expected a finite number; {which} such numbers, of "
                f"{self.examples:,}. Nothing was imported. To go on, {leave}set {COMPLETED} to False in the rows that "
                "have them."
            )
        return replace(self, kept=np.flatnonzero(~lost))

    @property
    def example_count(self) -> int:
        """How many examples are read."""
        return self.examples if self.kept is None else len(self.kept)

    def true_share(self) -> float:
        """Returns the share of True among the masks of the completed rows, having looked at every number.

        Raises:
          InterchangeError: A completed row was never written.
        """
        total = 0
        for rows, masks, margins in self.chunks():
            counts = masks.sum(axis=1, dtype=np.int64)
            empty = np.flatnonzero((counts == 0) & (margins == 0).all(axis=1))
            if len(empty):
                raise InterchangeError(
                    f"{self.path}: row {rows[empty[0]]} is marked completed, but all of it is zero, as in a row that "
                    f"was never written. Compute it again, or set {COMPLETED}[{rows[empty[0]]}] to False."
                )
            total += int(counts.sum())
        return total / (len(self.rows) * self.components)


def ablated_share(folder: MarginFolder, true_means: Meaning | None, said: float | None) -> tuple[float, Meaning]:
    """Returns the share of ablated components, and what True means in the masks.

    Raises:
      InterchangeError: The masks say something else than the user, or do not say which of the two True means.
    """
    if true_means not in (None, "kept", "ablated"):
        raise UnknownNameError("meaning of True", str(true_means), ("kept", "ablated"))
    share = folder.true_share()
    where = f"{folder.path / MASKS}: {share:.4g} of all entries are True"
    if true_means is None and share < 0.5:
        raise InterchangeError(
            f"{where}. The published code writes True for kept, so {1 - share:.4g} of the components would be ablated "
            "in each row. Say which it is: true_means='kept' or 'ablated' (`--true-means`)."
        )
    meaning: Meaning = true_means or "kept"
    ablated = 1 - share if meaning == "kept" else share
    if not 0 < ablated < 1:
        raise InterchangeError(f"{where}: each row is the same, and there is no effect to see. Give another run.")
    if said is None:
        return ablated, meaning
    if not 0 < said < 1:
        raise InterchangeError(f"ablate_fraction is {said}, expected a number between 0 and 1 (exclusive).")
    spread = np.sqrt(said * (1 - said) / (len(folder.rows) * folder.components))
    if abs(ablated - said) > _SIGMAS * spread + 0.5 / folder.components:  # the last: where each row has a whole number
        raise InterchangeError(
            f"{where}, that is {ablated:.4g} ablated if True means {meaning}, expected about {said:g}. Correct "
            "ablate_fraction or true_means, or leave them out to take what the files say."
        )
    return said, meaning


def _margins_name(path: Path, given: str | None) -> str:
    if not path.is_dir():
        raise InterchangeError(f"No folder at {path}. Give the folder with {MASKS}, *{MARGINS} and {COMPLETED}.")
    found = sorted(file.name for file in path.glob(f"*{MARGINS}"))
    if given is not None:
        name = given if given.endswith(".npy") else f"{given}.npy"
        if name not in found:
            raise UnknownNameError("file of margins", name, found, f"Looked in {path}.")
        return name
    if len(found) != 1:
        there = f"has {', '.join(found)}" if found else f"has no *{MARGINS}"
        advice = "Choose one with margins= (`--margins`)." if found else "Give the folder of a run."
        raise InterchangeError(f"{path} {there}, expected one such file. {advice}")
    return found[0]


def _memmap(path: Path) -> Array:
    """Returns an .npy file as a read-only map of its bytes; never unpickles."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InterchangeError(f"{path} is missing. A run has {MASKS}, *{MARGINS} and {COMPLETED}.") from None
    except (ValueError, EOFError) as error:
        raise InterchangeError(
            f"{path} is no .npy file that can be read as data: {str(error).rstrip('.')}. Restore it from a copy."
        ) from error


def _checked(path: Path, dimensions: int, kind: str) -> Array:
    array = _memmap(path)
    expected = {"b": "bool", "f": "float16, float32 or float64"}[kind]
    if array.dtype.kind != kind or array.dtype.itemsize > 8 or array.ndim != dimensions or not array.size:
        raise InterchangeError(
            f"{path} is {array.dtype} of shape {array.shape}, expected {expected} with {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''}, none of them empty. Give the files of one run as they are."
        )
    return array
