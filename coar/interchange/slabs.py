"""Attributions slab by slab: as many examples at a time as fit into a fixed memory, never across a stored block."""

from __future__ import annotations

from collections.abc import Iterator

from stores import AttributionStore

SLAB_BYTES = 64 * 2**20


def slabs(store: AttributionStore, bytes_per_example: int) -> Iterator[slice]:
    """Yields runs of examples, in order, that take at most SLAB_BYTES (or are one example) and lie in one block."""
    step = max(1, SLAB_BYTES // bytes_per_example)
    for first in range(0, store.example_count, store.block_examples):
        last = min(first + store.block_examples, store.example_count)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last))
