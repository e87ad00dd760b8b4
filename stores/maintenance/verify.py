"""Reading everything in a store back: what is damaged, in which files, and what is merely left over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from stores.blocks.blocks import DIGEST_BYTES
from stores.blocks.copies import FOLDER as COPIES
from stores.blocks.copies import damaged_files, read_mark
from stores.blocks.reading import stored_size
from stores.campaign import KIND as CAMPAIGN
from stores.errors import DamagedBlockError, StoreUnreadableError
from stores.format.groups import Location, read_column
from stores.format.layout import COPY_KINDS
from stores.format.root import ROOT, read_root
from stores.opening import OpenStore, open_any
from stores.storage import objects

BLOCK, METADATA, TABLE, COPY = "block", "metadata", "table", "copy"
TABLES = ("examples", "components")

Told = Callable[[int, int], object]


@dataclass(frozen=True)
class Damage:
    """One thing in a store that is not what was written.

    Attributes:
      what: `block` (data or mark), `metadata` (of an array), `table` (a column of examples or components), or `copy`.
      files: The files that are, or may be, damaged.
      why: What is wrong with them.
      block: The block's number, of a damaged block.
    """

    what: str
    files: tuple[str, ...]
    why: str
    block: int | None = None

    @property
    def repairable(self) -> bool:
        """Whether `repair` can mend it; tables are written once and kept nowhere else."""
        return self.what != TABLE

    def __str__(self) -> str:
        return f"{'' if self.block is None else f'block {self.block}: '}{self.why}: {', '.join(self.files)}"


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
      where, kind, format_version: Which store, `campaign` or `attributions`, and of which format.
      blocks, finished: How many blocks it has, and of them how many are marked finished.
      rows, bytes: How many rows (of attributions: examples) were read back whole, and their size.
      damages: What is damaged; empty for a sound store.
      leftovers: Files that belong to no finished block, or to no copy that is read: harmless, never read as data.
      partials: Files that a killed write has left, or that are being written.
    """

    where: str
    kind: str
    format_version: int
    blocks: int
    finished: int
    rows: int
    bytes: int
    damages: tuple[Damage, ...]
    leftovers: tuple[str, ...]
    partials: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    @property
    def damaged_blocks(self) -> list[int]:
        """The numbers of the damaged blocks."""
        return sorted({damage.block for damage in self.damages if damage.block is not None})

    def text(self) -> str:
        """Returns it as sentences: what was read, every damage with its files, and what to do."""
        unit = "rows" if self.kind == CAMPAIGN else "examples"
        read = f"{self.rows:,} {unit} ({self.bytes / 2**20:,.1f} MiB) were read back and fit their sha256"
        state = f"{self.finished} of {self.blocks} blocks are finished; {read}."
        lines = [f"{self.where}: {'sound' if self.sound else 'DAMAGED'}. {state}"]
        lines += [f"  {damage}" for damage in self.damages]
        if any(damage.repairable for damage in self.damages):
            lines.append(
                f"`coar repair {self.where}` forgets what is damaged; then run the same command again to make it anew."
            )
        if not all(damage.repairable for damage in self.damages):
            lines.append(
                "Damaged tables cannot be repaired: restore the store from a copy, or run again into a new one."
            )
        for files, what in ((self.leftovers, "of unfinished work"), (self.partials, "of writes in between")):
            if files:
                count = f"1 file {what} is" if len(files) == 1 else f"{len(files)} files {what} are"
                lines.append(f"{count} there: harmless, never read as data.")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON-able values."""
        return {**asdict(self), "sound": self.sound, "damaged_blocks": self.damaged_blocks}


def verify(location: Location, *, on_block: Told = lambda done, total: None) -> Report:
    """Returns what is damaged in a store, after reading back every finished block and table. Mutates nothing.

    Also while workers are at it: blocks that are finished meanwhile are not looked at.

    Args:
      location: A campaign or attribution store, of this format or an older one.
      on_block: Called with how many finished blocks were read, and how many there are.

    Cost: reads the whole store once; memory for one block.

    Raises:
      StoreNotFoundError, StoreUnreadableError: Nothing, or something else, is there, or its root is damaged.
    """
    return _Inspection(open_any(location)).report(on_block)


@dataclass
class _Inspection:
    """One walk through an open store."""

    opened: OpenStore
    damages: list[Damage] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self.blocks = self.opened.blocks
        self.store = self.blocks.store

    def report(self, on_block: Told) -> Report:
        """Looks at everything."""
        marked = self._marked()
        for done, block in enumerate(marked):
            on_block(done, len(marked))
            self._look_at_block(block)
        on_block(len(marked), len(marked))
        self._look_at_metadata()
        self._look_at_tables()
        self._look_at_copies()
        leftovers = [*self._leftover_blocks({*marked}), *self._leftover_copies()]
        header = self.opened.header
        return Report(
            self.opened.where,
            header["format"],
            header["format_version"],
            self.blocks.count,
            len(marked),
            self.rows,
            self.bytes,
            tuple(self.damages),
            tuple(sorted(leftovers)),
            tuple(partials(self.store)),
        )

    def _path(self, key: str) -> str:
        return f"{self.opened.where}/{key}"

    def _marked(self) -> list[int]:
        """Returns the blocks that have a mark, sound or not; zeros are none."""
        found = []
        for block in range(self.blocks.count):
            mark = objects.read(self.store, self.blocks._mark_file(block))
            if mark is not None and (len(mark) != DIGEST_BYTES or any(mark)):
                found.append(block)
        return found

    def _look_at_block(self, block: int) -> None:
        try:
            values = self.blocks.read(block)
        except DamagedBlockError as error:
            for why, keys in self._diagnose(block, error):
                self.damages.append(Damage(BLOCK, tuple(map(self._path, keys)), why, block))
            return
        span = self.blocks.span(block)
        self.rows += span.stop - span.start
        self.bytes += sum(value.nbytes for value in values.values())

    def _diagnose(self, block: int, error: DamagedBlockError) -> Iterator[tuple[str, list[str]]]:
        """Yields what is wrong with a damaged block, and the keys of the files."""
        mark = self.blocks._mark_file(block)
        length = stored_size(self.store, mark)
        if length != DIGEST_BYTES:
            yield f"the mark has {length} bytes, expected {DIGEST_BYTES}", [mark]
            return
        files = {name: self.blocks._file(name, block) for name in self.blocks.arrays}
        wrong = [(self._wrong_with(name, block), key) for name, key in files.items()]
        found = [(why, [key]) for why, key in wrong if why]
        yield from found or [(f"the data do not fit their mark ({_last_part(error)})", [mark, *files.values()])]

    def _wrong_with(self, name: str, block: int) -> str:
        """Returns what is wrong with one file of a block, or nothing."""
        array, size = self.blocks.arrays[name], stored_size(self.store, self.blocks._file(name, block))
        expected = fixed_size(array)
        if size is None:
            return "the file is gone"
        if size == 0:
            return "the file is empty"
        if expected is not None and size != expected:
            return f"the file was {'cut' if size < expected else 'made longer'}: {size:,} bytes, expected {expected:,}"
        try:
            _ = array[self.blocks.span(block)]
        except (ValueError, RuntimeError, OSError) as error:
            return f"the file's bytes were changed ({error})"
        return ""

    def _look_at_metadata(self) -> None:
        """Compares every array's own metadata with the root's, which are what readers of ours go by."""
        for path, wanted in known_nodes(self.opened).items():
            key = f"{path}/{ROOT}"
            data = objects.read(self.store, key)
            if data is None or not _same_node(data, wanted):
                why = "the metadata are gone" if data is None else "the metadata are not what the root says"
                self.damages.append(Damage(METADATA, (self._path(key),), why))

    def _look_at_tables(self) -> None:
        for path, node in known_nodes(self.opened).items():
            if path.split("/")[0] in TABLES and node["node_type"] == "array":
                try:
                    column: Any = self.opened._group[path]
                    read_column(column, f"the column {path} is damaged")
                except StoreUnreadableError as error:
                    why = f"the column {path} cannot be read: {_last_part(error)}"
                    self.damages.append(Damage(TABLE, (self._path(f"{path}/c/0"),), why))

    def _look_at_copies(self) -> None:
        if self._marks_are_readable():
            bad = damaged_files(self.blocks)
            if bad:
                why = "a copy for fast reading is damaged"
                self.damages.append(Damage(COPY, tuple(map(self._path, bad)), why))

    def _marks_are_readable(self) -> bool:
        """Returns whether the ledger, which copies are bound to, can be read at all."""
        return not any(damage.what == BLOCK and "the mark has" in damage.why for damage in self.damages)

    def _leftover_blocks(self, marked: set[int]) -> Iterator[str]:
        """Yields keys of data that no mark belongs to."""
        for array in self.blocks.arrays.values():
            for name in objects.names(self.store, f"{array.path}/c"):
                key = "/".join([array.path, "c", name, *["0"] * (array.ndim - 1)])
                if not (name.isdigit() and int(name) in marked) and stored_size(self.store, key) is not None:
                    yield key

    def _leftover_copies(self) -> Iterator[str]:
        """Yields the folders of copies that nobody reads: unfinished, or of what the store held before."""
        kinds = COPY_KINDS if self._marks_are_readable() else ()
        read = {kind: read_mark(self.blocks, kind) for kind in kinds}
        current = {str(mark["source"])[:16] for mark in read.values() if mark is not None}
        for name in objects.names(self.store, COPIES):
            kind, _, source = name.partition("-")
            if kind in COPY_KINDS and (read.get(kind) is None or source not in current):
                yield f"{COPIES}/{name}"


def known_nodes(opened: OpenStore) -> dict[str, Any]:
    """Returns the metadata of every array and group as the root has them, by path."""
    return dict(read_root(opened.blocks.store, opened.where)["consolidated_metadata"]["metadata"])


def fixed_size(array: zarr.Array[Any]) -> int | None:
    """Returns how many bytes each file of an array has, or None where that depends on what is in it."""
    codecs: Any = array.metadata.to_dict()["codecs"]
    chunks, shards, itemsize = array.chunks, array.shards, int(array.dtype.itemsize)
    if shards is None:
        return prod(chunks) * itemsize + _overhead(codecs) if _is_plain(codecs) else None
    inner, index = (codecs[0]["configuration"][key] for key in ("codecs", "index_codecs"))
    if len(codecs) > 1 or not _is_plain(inner) or not _is_plain(index):
        return None
    pieces = prod(shard // chunk for shard, chunk in zip(shards, chunks, strict=True))
    return int(pieces) * (prod(chunks) * itemsize + _overhead(inner) + 16) + _overhead(index)


def _is_plain(codecs: list[dict[str, Any]]) -> bool:
    return {codec["name"] for codec in codecs} <= {"bytes", "crc32c"}


def _overhead(codecs: list[dict[str, Any]]) -> int:
    return 4 * len([codec for codec in codecs if codec["name"] == "crc32c"])


def _same_node(data: bytes, wanted: Any) -> bool:
    try:
        found = json.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and _own(found) == _own(wanted)


def _own(node: dict[str, Any]) -> dict[str, Any]:
    """Returns a node's metadata without those of what is below it."""
    return {key: value for key, value in node.items() if key != "consolidated_metadata"}


def partials(store: Store) -> list[str]:
    """Returns the keys of files that a write, killed or going on, has not put in their place yet."""
    if not isinstance(store, LocalStore):
        return []
    found = []
    for folder, _, names in os.walk(store.root):  # follows no link out of the store
        below = Path(folder).relative_to(store.root)
        found += [(below / name).as_posix() for name in names if name.endswith(".partial")]
    return sorted(found)


def _last_part(error: Exception) -> str:
    """Returns what an error says is wrong, without where and what to do."""
    text = str(error).split(" is damaged: ", 1)[-1]
    return text.split(". ", 1)[0].split(". `", 1)[0].removesuffix(".")
