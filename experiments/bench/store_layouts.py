"""What writing and reading stores costs beside numpy's memmap: attributions by row and column, campaigns by block."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.bench.store_timing import cold_and_warm, files_of, gib, markdown, paragraph, seconds
from stores import AttributionStore, CampaignStore
from stores.blocks.reading import SWITCH, fast_reading
from stores.maintenance.compact import make_copies

BLOCK = 256  # examples of a block of attributions, as `fit` and `estimate` make them
BLOCK_ROWS = 64  # of a campaign, as a spec has it by default
SLAB = 1024  # examples that a fit reads at a time
SEED = 0

Floats = npt.NDArray[np.float32]
Reads = tuple[float, float, float, float]  # row cold, row warm, column cold, column warm


@dataclass(frozen=True)
class Size:
    """How large the stores are."""

    examples: int
    components: int
    rows: int  # of the campaign
    questions: int  # reads of each kind

    @property
    def bytes_needed(self) -> int:
        """The most that lies on the disk at once: weights, errors, a copy of both by row and column, two memmaps."""
        return 8 * 4 * self.examples * self.components + 3 * 4 * self.rows * self.examples


@contextmanager
def reading(fast: bool) -> Iterator[None]:
    """Lets stores be read by tensorstore, or by zarr alone."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1" if fast else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def has_tensorstore() -> bool:
    """Returns whether tensorstore can be measured here."""
    with reading(True):
        return fast_reading()


class Matrix:
    """A made-up matrix whose blocks differ and are cheap to make: one block of noise, plus the block's number."""

    def __init__(self, columns: int, block: int) -> None:
        self.block = block
        self._noise = np.random.default_rng(SEED).standard_normal((block, columns), dtype=np.float32)

    def rows(self, start: int, stop: int) -> Floats:
        """Returns the rows of one block."""
        return np.asarray(self._noise[: stop - start] + np.float32(start // self.block))

    def row(self, i: int) -> Floats:
        """Returns one row."""
        return np.asarray(self._noise[i % self.block] + np.float32(i // self.block))

    def column(self, j: int, rows: int) -> Floats:
        """Returns one column."""
        i = np.arange(rows)
        return np.asarray(self._noise[i % self.block, j] + (i // self.block).astype(np.float32))


def text(prefix: str, count: int) -> npt.NDArray[Any]:
    """Returns names, as stores hold them."""
    return np.array([f"{prefix}{i}" for i in range(count)], dtype=object)


@dataclass(frozen=True)
class Line:
    """One line of a table: files and bytes where they are told, and four medians in seconds."""

    name: str
    reads: Reads
    files: int | None = None
    bytes: int | None = None

    def cells(self, memmap: Reads) -> list[str]:
        """Returns the line's cells: milliseconds, and the ratios of cold reads to a memmap's."""
        size = "" if self.bytes is None else gib(self.bytes)
        ratios = [f"{self.reads[i] / memmap[i]:.3f}" for i in (0, 2)]
        times = [f"{1e3 * value:.1f}" for value in self.reads]
        return [self.name, "" if self.files is None else f"{self.files:,}", size, *times, *ratios]


def attributions_part(folder: Path, size: Size) -> list[str]:
    """Returns the table of reading one example's attributions, and one component's column."""
    place = folder / "attributions.zarr"
    matrix = Matrix(size.components, BLOCK)
    written = seconds(lambda: write_attributions(place, matrix, size))
    lines = _store_lines("blocks, as written", place, lambda: _store_reads(place, matrix, size))
    copied = seconds(lambda: make_copies(place))
    os.sync()
    lines += _store_lines("with row and column copies", place, lambda: _store_reads(place, matrix, size))
    shutil.rmtree(place)
    for order in ("C", "F"):
        file = folder / f"memmap_{order}.bin"
        write_memmap(file, matrix, size, order)
        lines.append(Line(f"numpy memmap, {order} order", _memmap_reads(file, matrix, size, order), 1, _bytes(file)))
        file.unlink()
    memmap = lines[-2].reads
    amount = 8 * size.examples * size.components
    return [
        f"## One example, one component: {size.examples:,} x {size.components:,} float32",
        "",
        *paragraph(
            f"Medians of {size.questions} reads each, of `weights`. Files and sizes are of the whole store, weights "
            f"and standard errors. Written in blocks of {BLOCK} examples at {amount / written / 2**20:,.0f} MiB/s; "
            f"both copies made in {copied:.0f} s, every block and every file checked. Ratios are of cold reads to "
            "the memmap in C order."
        ),
        *_table("weights", "row", "column", [line.cells(memmap) for line in lines]),
    ]


def _store_lines(name: str, place: Path, reads: Callable[[], Reads]) -> list[Line]:
    """Returns the lines of a store read by zarr, and by tensorstore where it is installed."""
    with reading(False):
        lines = [Line(name, reads(), len(files_of(place)), _bytes(place))]
    if has_tensorstore():
        with reading(True):
            lines.append(Line("... by tensorstore", reads()))
    return lines


def _table(what: str, first: str, second: str, rows: list[list[str]]) -> list[str]:
    times = [f"{part} {state}, ms" for part in (first, second) for state in ("cold", "warm")]
    return markdown([what, "files", "size", *times, f"{first} / memmap", f"{second} / memmap"], rows)


def write_attributions(place: Path, matrix: Matrix, size: Size) -> None:
    """Writes a whole attribution store."""
    store = AttributionStore.create(
        place,
        header={"identity": {"method": "made up"}},
        components={"id": np.arange(size.components), "name": text("c", size.components)},
        examples={
            "id": text("e", size.examples),
            "label": np.zeros(size.examples, dtype=np.int64),
            "group": text("g", size.examples),
        },
        block_examples=BLOCK,
    )
    for block in store.missing_blocks():
        span = store.span(block)
        weights = matrix.rows(span.start, span.stop)
        column = np.ones(len(weights), dtype=np.float32)
        values = {"weights": weights, "stderr": weights, "bias": column}
        store.write_block(block, values | {f"quality/{name}": column for name in store.quality_names})
    os.sync()


def write_memmap(file: Path, matrix: Matrix, size: Size, order: Any) -> None:
    """Writes the same weights as one file."""
    values = np.memmap(file, dtype=np.float32, mode="w+", shape=(size.examples, size.components), order=order)
    if order == "C":
        for start in range(0, size.examples, BLOCK):
            stop = min(start + BLOCK, size.examples)
            values[start:stop] = matrix.rows(start, stop)
    else:
        for j in range(size.components):
            values[:, j] = matrix.column(j, size.examples)
    values.flush()
    os.sync()


def _store_reads(place: Path, matrix: Matrix, size: Size) -> Reads:
    store = AttributionStore.open(place)
    return _reads(place, matrix, size, lambda i: store.weights[i], lambda j: store.weights[:, j])


def _memmap_reads(file: Path, matrix: Matrix, size: Size, order: Any) -> Reads:
    def opened() -> Any:  # anew each time: pages that are mapped are not dropped
        return np.memmap(file, dtype=np.float32, mode="r", shape=(size.examples, size.components), order=order)

    return _reads(file, matrix, size, lambda i: np.array(opened()[i]), lambda j: np.array(opened()[:, j]))


def _reads(
    place: Path, matrix: Matrix, size: Size, row: Callable[[int], Floats], column: Callable[[int], Floats]
) -> Reads:
    """Returns the medians, after comparing one row and one column with what was written."""
    generator = np.random.default_rng(SEED + 1)
    chosen = generator.choice(size.examples, size.questions, replace=False).tolist()
    columns = generator.choice(size.components, size.questions, replace=False).tolist()
    np.testing.assert_array_equal(row(chosen[0]), matrix.row(chosen[0]))
    np.testing.assert_array_equal(column(columns[0]), matrix.column(columns[0], size.examples))
    return (
        *cold_and_warm([partial(row, i) for i in chosen], place),
        *cold_and_warm([partial(column, j) for j in columns], place),
    )


def _bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in files_of(place))


def campaign_part(folder: Path, size: Size) -> list[str]:
    """Returns the table of writing blocks of a campaign, and of reading slabs and single examples."""
    place, file = folder / "campaign.zarr", folder / "outputs.bin"
    matrix = Matrix(size.examples, BLOCK_ROWS)
    spent, plain = write_campaign(place, matrix, size), write_rows(file, matrix, size)
    os.sync()
    lines = _store_lines("blocks, as written", place, lambda: _campaign_reads(place, matrix, size))
    copied = seconds(lambda: make_copies(place))
    os.sync()
    lines += _store_lines("with a column copy", place, lambda: _campaign_reads(place, matrix, size))

    def mapped() -> Any:
        return np.memmap(file, dtype=np.float32, mode="r", shape=(size.rows, size.examples))

    memmap = _slab_reads(
        file, matrix, size, lambda a, b: np.array(mapped()[:, a:b]), lambda a: np.array(mapped()[:, a])
    )
    lines.append(Line("numpy memmap", memmap, 1, _bytes(file)))
    shutil.rmtree(place)
    file.unlink()
    speed = [4 * size.rows * size.examples / value / 2**20 for value in (spent, plain)]
    return [
        f"## Blocks of rows, slabs of examples: {size.rows:,} x {size.examples:,} float32",
        "",
        *paragraph(
            f"A slab is all rows of {SLAB:,} examples, as a fit reads them; an example is all of its rows. Blocks of "
            f"{BLOCK_ROWS} rows are written at {speed[0]:,.0f} MiB/s: with the keep-vectors of {size.components:,} "
            "components, reading back, sha256, waiting for the disk and the ledger. A memmap that is flushed after "
            f"every block: {speed[1]:,.0f} MiB/s, so that a block costs {speed[1] / speed[0]:.2f} times as much. The "
            f"copy was made in {copied:.1f} s, every block and every file checked."
        ),
        *_table("outputs", "slab", "example", [line.cells(memmap) for line in lines]),
    ]


def write_campaign(place: Path, matrix: Matrix, size: Size) -> float:
    """Writes a whole campaign and returns the seconds that its blocks took."""
    store = new_campaign(place, size)
    keep = np.random.default_rng(SEED).random((BLOCK_ROWS, size.components)) < 0.95
    spent = 0.0
    for block in range(len(store.blocks)):
        span = store.span(block)
        outputs = matrix.rows(span.start, span.stop)
        spent += seconds(partial(store.write_block, block, keep[: len(outputs)], outputs))
    return spent


def new_campaign(place: Path, size: Size) -> CampaignStore:
    """Returns an empty campaign."""
    return CampaignStore.create(
        place,
        header={"identity": {}, "spec": {}},
        components={"id": np.arange(size.components), "name": text("c", size.components)},
        examples={
            "id": text("e", size.examples),
            "label": np.zeros(size.examples, dtype=np.int64),
            "group": text("g", size.examples),
        },
        rows=size.rows,
        block_rows=BLOCK_ROWS,
    )


def write_rows(file: Path, matrix: Matrix, size: Size) -> float:
    """Writes the same outputs as one file, flushed after every block, and returns the seconds."""
    values = np.memmap(file, dtype=np.float32, mode="w+", shape=(size.rows, size.examples))
    spent = 0.0
    for start in range(0, size.rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, size.rows)
        part = matrix.rows(start, stop)

        def write(start: int = start, stop: int = stop, part: Floats = part) -> None:
            values[start:stop] = part
            values.flush()

        spent += seconds(write)
    return spent


def _campaign_reads(place: Path, matrix: Matrix, size: Size) -> Reads:
    store = CampaignStore.open(place)
    return _slab_reads(place, matrix, size, lambda a, b: store.outputs[:, a:b], lambda a: store.outputs[:, a])


def _slab_reads(
    place: Path, matrix: Matrix, size: Size, slab: Callable[[int, int], Floats], example: Callable[[int], Floats]
) -> Reads:
    """Returns the medians of slabs and of examples, after comparing one of each with what was written."""
    generator = np.random.default_rng(SEED + 2)
    starts = [int(a) for a in generator.integers(0, max(1, size.examples - SLAB), size.questions)]
    np.testing.assert_array_equal(example(starts[0]), matrix.column(starts[0], size.rows))
    np.testing.assert_array_equal(slab(starts[0], starts[0] + SLAB)[:, 0], matrix.column(starts[0], size.rows))
    return (
        *cold_and_warm([partial(slab, a, a + SLAB) for a in starts], place),
        *cold_and_warm([partial(example, a) for a in starts], place),
    )
