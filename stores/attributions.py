"""AttributionStore: one linear attribution per example, with standard errors and quality, and how it was estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Columns,
    Location,
    create_group,
    describe_location,
    open_group,
    read_columns,
    write_columns,
)
from stores.format.layout import tile_width
from stores.work.worklog import environments

KIND = "attributions"
QUALITY = ("correlation", "r2", "ridge", "residual_sd")


class AttributionStore:
    """Attributions on disk: `weights` and `stderr` (examples, components) float32, `bias` (examples,), quality columns.

    `output(keep) ~ bias + sum_i weights_i * keep_i`: a positive weight means that the component supports the output.
    """

    def __init__(self, group: zarr.Group, location: Location) -> None:
        self.location = location
        self.where = describe_location(location)
        self._group = group
        self.header: dict[str, Any] = dict(group.attrs)
        self.quality_names = tuple(self.header.get("quality", QUALITY))
        names = ("weights", "stderr", "bias", *(f"quality/{name}" for name in self.quality_names))
        self.blocks = Blocks(group, names, self.where)
        self._copies = Copies(self.blocks, ("weights", "stderr"))
        self.example_count: int = self.blocks.rows
        self.block_examples: int = self.blocks.block
        self.component_count: int = self.blocks.arrays["weights"].shape[1]

    @classmethod
    def create(
        cls,
        location: Location,
        *,
        header: Mapping[str, Any],
        components: Columns,
        examples: Columns,
        block_examples: int,
        quality: Sequence[str] = QUALITY,
    ) -> AttributionStore:
        """Makes an empty store, whole or not at all, and returns it open for writing.

        `quality` names the columns that say per example how good the estimate is; they may hold NaN, `correlation` is
        always among them.

        Raises:
          StoreExistsError: Something is there already.
        """
        component_count, example_count = len(components["id"]), len(examples["id"])

        def fill(group: zarr.Group) -> None:
            block = min(block_examples, example_count)
            tile = tile_width(block, component_count, 4)
            for name in ("weights", "stderr"):
                add_block_array(
                    group, name, example_count, block, component_count, "float32", (EXAMPLES, COMPONENTS), tile
                )
            add_block_array(group, "bias", example_count, block, None, "float32", (EXAMPLES,))
            columns = group.require_group("quality")
            for name in quality:
                add_block_array(columns, name, example_count, block, None, "float32", (EXAMPLES,))
            add_ledger(group, example_count, block)
            write_columns(group, "examples", EXAMPLES, examples)
            write_columns(group, "components", COMPONENTS, components)
            own = {"quality": list(quality), "format": KIND, "format_version": FORMAT_VERSION}
            group.update_attributes({**header, **own})

        create_group(location, fill)
        return cls(open_group(location, KIND, "r+"), location)

    @classmethod
    def open(cls, location: Location, *, finish: bool = False) -> AttributionStore:
        """Returns the finished store at `location`, read-only. Mutates nothing.

        With `finish`, a store that is not finished is returned, too, open for writing what is missing.

        Raises:
          StoreNotFoundError, StoreUnreadableError: Nothing, or something else, is there.
          UnfinishedStoreError: The estimation that writes it has not finished.
          DamagedBlockError: A finished block has lost a file.
        """
        store = cls(open_group(location, KIND, "r+" if finish else "r"), location)
        finished = store.blocks.finished()
        if not finished.all() and not finish:
            raise UnfinishedStoreError(
                f"{store.where}: only {int(finished.sum())} of {len(finished)} blocks of examples are estimated. "
                "Run the same again to finish it."
            )
        store.blocks.check_present()
        return store

    @property
    def weights(self) -> Rows:
        """Effect of keeping each component, in units of the output, (examples, components) float32; index to read."""
        return Rows(self.blocks, "weights", copies=self._copies)

    @property
    def stderr(self) -> Rows:
        """Standard error of each weight, same shape and unit; index to read."""
        return Rows(self.blocks, "stderr", copies=self._copies)

    @property
    def bias(self) -> Rows:
        """Predicted output with every component ablated, (examples,) float32; index to read."""
        return Rows(self.blocks, "bias")

    @property
    def quality(self) -> dict[str, npt.NDArray[np.float32]]:
        """Quality of the finished examples, one column per name in `quality_names`; `correlation` is held out."""
        rows = self.blocks.finished_rows()
        return {name: self.blocks.take(f"quality/{name}", rows) for name in self.quality_names}

    @property
    def examples(self) -> dict[str, npt.NDArray[Any]]:
        """The columns `id`, `label`, `group` of the examples."""
        return read_columns(self._group, "examples")

    @property
    def components(self) -> dict[str, npt.NDArray[Any]]:
        """The columns of the component index."""
        return read_columns(self._group, "components")

    def missing_blocks(self) -> list[int]:
        """Returns the numbers of the blocks of examples still to estimate."""
        return [int(block) for block in np.flatnonzero(~self.blocks.finished())]

    def blocks_of(self, examples: slice) -> list[int]:
        """Returns the blocks that a slab of examples, aligned to blocks, is made of."""
        return list(range(examples.start // self.block_examples, -(-examples.stop // self.block_examples)))

    @property
    def environments(self) -> list[dict[str, Any]]:
        """What the workers ran on, without repetitions: versions, device, threads, ..., oldest first."""
        return environments(self.header, self.blocks.store)

    def write_block(self, block: int, values: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Writes `weights`, `stderr`, `bias` and `quality/*` of a block of examples, then marks it finished.

        Only quality may hold NaN: the number is undefined there; and in a store that says in `lacking` which examples
        have no attribution, theirs. Returns False, and changes nothing, if the block was finished already.
        """
        undefined = [f"quality/{name}" for name in self.quality_names]
        undefined += ["weights", "stderr", "bias"] if self.header.get("lacking") else []
        return self.blocks.write(block, values, undefined=undefined)

    def span(self, block: int) -> slice:
        """Returns the examples of a block."""
        return self.blocks.span(block)

    def verify(self) -> None:
        """Reads everything back and raises DamagedBlockError unless each block's sha256 is the ledger's."""
        for block in range(len(self.blocks)):
            self.blocks.read(block)
