"""CampaignStore: the outputs of many keep-vectors on many examples, and everything needed to run them again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from stores.blocks.blocks import Blocks, add_block_array, add_ledger
from stores.blocks.copies import Copies
from stores.blocks.rows import Rows
from stores.errors import UnfinishedStoreError
from stores.format.groups import (
    COMPONENTS,
    EXAMPLES,
    FORMAT_VERSION,
    KEEP_BYTES,
    KEEP_ROWS,
    Columns,
    Location,
    create_group,
    describe_location,
    open_group,
    read_columns,
    write_columns,
)
from stores.format.keepbits import pack_keep, packed_width, unpack_keep
from stores.work.worklog import environments

KIND = "campaign"


@dataclass(frozen=True)
class Progress:
    """How far a campaign is."""

    finished_blocks: int
    blocks: int
    finished_rows: int
    rows: int

    @property
    def complete(self) -> bool:
        """Whether every block is finished."""
        return self.finished_blocks == self.blocks


class CampaignStore:
    """One campaign on disk: `outputs` (rows, examples) float32 and `keep` (rows, components) bool, True = kept.

    `outputs` and `keep` are lazy views of the finished rows; `examples` and `components` are tables (dicts of columns);
    `header` holds the spec, the hashes of model, data, index and plan, and the versions that wrote it.
    """

    def __init__(self, group: zarr.Group, location: Location) -> None:
        self.location = location
        self.where = describe_location(location)
        self._group = group
        self.blocks = Blocks(group, ("outputs", "keep"), self.where)
        self._copies = Copies(self.blocks, ("outputs",))
        self.header: dict[str, Any] = dict(group.attrs)
        self.rows: int = self.blocks.rows
        self.block_rows: int = self.blocks.block
        self.component_count = int(self.header["component_count"])
        self.example_count: int = self.blocks.arrays["outputs"].shape[1]

    @classmethod
    def create(
        cls,
        location: Location,
        *,
        header: Mapping[str, Any],
        components: Columns,
        examples: Columns,
        rows: int,
        block_rows: int,
    ) -> CampaignStore:
        """Makes an empty store, whole or not at all, and returns it open for writing.

        Args:
          location: A path or a zarr store object.
          header: JSON-able attributes; `format`, `format_version` and `component_count` are added.
          components: The index's columns, one value per component.
          examples: `id`, `label`, `group`: one value per example.
          rows: Number of keep-vectors.
          block_rows: Keep-vectors per block, the unit of work and of commitment.

        Raises:
          StoreExistsError: Something is there already.
        """
        component_count, example_count = len(components["id"]), len(examples["id"])

        def fill(group: zarr.Group) -> None:
            block = min(block_rows, rows)
            add_block_array(group, "outputs", rows, block, example_count, "float32", (KEEP_ROWS, EXAMPLES))
            add_block_array(group, "keep", rows, block, packed_width(component_count), "uint8", (KEEP_ROWS, KEEP_BYTES))
            add_ledger(group, rows, block)
            write_columns(group, "examples", EXAMPLES, examples)
            write_columns(group, "components", COMPONENTS, components)
            group.update_attributes(
                {**header, "format": KIND, "format_version": FORMAT_VERSION, "component_count": component_count}
            )

        create_group(location, fill)
        return cls.open(location, mode="r+")

    @classmethod
    def open(cls, location: Location, mode: str = "r") -> CampaignStore:
        """Returns the store at `location`, read-only unless mode is `r+`. Mutates nothing.

        Opened for reading, it shows what was finished when it was opened, also while a campaign goes on: open it again
        to see more.

        Raises:
          StoreNotFoundError, StoreUnreadableError: Nothing, or something else, is there.
          DamagedBlockError: A finished block has lost a file.
        """
        store = cls(open_group(location, KIND, mode), location)
        store.blocks.check_present()
        return store

    @property
    def outputs(self) -> Rows:
        """The outputs of the finished rows, (finished rows, examples) float32; index it to read."""
        return Rows(self.blocks, "outputs", copies=self._copies)

    @property
    def keep(self) -> Rows:
        """The keep-vectors of the finished rows, (finished rows, components) bool; index it to read."""

        def decode(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
            return unpack_keep(packed, self.component_count)

        return Rows(self.blocks, "keep", decode, self.component_count)

    @property
    def finished_rows(self) -> npt.NDArray[np.int64]:
        """The plan's row numbers of the finished rows, ascending; row i of `outputs` is plan row `finished_rows[i]`."""
        return self.blocks.finished_rows()

    @property
    def examples(self) -> dict[str, npt.NDArray[Any]]:
        """The columns `id`, `label`, `group` of the examples."""
        return read_columns(self._group, "examples")

    @property
    def components(self) -> dict[str, npt.NDArray[Any]]:
        """The columns of the component index."""
        return read_columns(self._group, "components")

    @property
    def progress(self) -> Progress:
        """How many blocks and rows are finished."""
        done = self.blocks.finished()
        return Progress(int(done.sum()), len(done), len(self.finished_rows), self.rows)

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of the ledger: two stores with equal finished data have equal fingerprints."""
        return hashlib.sha256(self.blocks.digests().tobytes()).hexdigest()

    def finished_blocks(self) -> list[int]:
        """Returns the numbers of the finished blocks."""
        return [int(block) for block in np.flatnonzero(self.blocks.finished())]

    def missing_blocks(self) -> list[int]:
        """Returns the numbers of the blocks still to compute."""
        return [int(block) for block in np.flatnonzero(~self.blocks.finished())]

    def span(self, block: int) -> slice:
        """Returns the plan rows of a block."""
        return self.blocks.span(block)

    def require_complete(self) -> None:
        """Raises UnfinishedStoreError, with the missing blocks, unless every block is finished."""
        missing = self.missing_blocks()
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise UnfinishedStoreError(
                f"{self.where}: {len(missing)} of {len(self.blocks)} blocks are not finished ({shown}). "
                "Run the same `coar ablate` command again to finish it."
            )

    def write_block(self, block: int, keep: npt.NDArray[np.bool_], outputs: npt.NDArray[np.float32]) -> bool:
        """Writes a block's keep-vectors (rows, components) and outputs (rows, examples), then marks it finished.

        Returns False, and changes nothing, if it was finished already.

        Raises:
          ValueError: Another dtype or shape, or an output that is no finite number.
        """
        span = self.span(block)
        expected = (span.stop - span.start, self.component_count)
        if keep.dtype != np.bool_ or keep.shape != expected:
            raise ValueError(
                f"{self.where}: keep of block {block} is {keep.dtype} of shape {keep.shape}, expected bool of shape "
                f"{expected}."
            )
        return self.blocks.write(block, {"keep": pack_keep(keep), "outputs": outputs})

    def read_block(self, block: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Returns a finished block's (keep, outputs), checked against its sha256 in the ledger."""
        values = self.blocks.read(block)
        return unpack_keep(values["keep"], self.component_count), values["outputs"]

    def read_keep(self, block: int) -> npt.NDArray[np.bool_]:
        """Returns the keep-vectors of a finished block; bytes are checked by crc32c only."""
        self.blocks.require_finished(block)
        span = self.span(block)
        packed = self.blocks.take("keep", np.arange(span.start, span.stop))
        return unpack_keep(packed, self.component_count)

    def read_outputs(self, block: int, examples: slice) -> npt.NDArray[np.float32]:
        """Returns the outputs of a finished block for a slab of examples; bytes are checked by crc32c only."""
        self.blocks.require_finished(block)
        span = self.span(block)
        return self.blocks.take("outputs", np.arange(span.start, span.stop), examples)

    @property
    def environments(self) -> list[dict[str, Any]]:
        """What the workers ran on, without repetitions: versions, device, threads, ..., oldest first."""
        return environments(self.header, self.blocks.store)
