"""Bytes on disk before anything runs: the empty store is made in memory and weighed, its blocks counted by shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from ablate import CampaignSpec, ComponentIndex, Examples
from coar.estimators.estimate import QUALITY as GRADIENT_QUALITY
from coar.estimators.regression.fit import QUALITY as REGRESSION_QUALITY
from stores import AttributionStore, CampaignStore

_CHECKSUM = 4  # crc32c, of a chunk and of a shard's index
_PLACE = 16  # offset and length of a chunk in a shard's index


def campaign_bytes(
    spec: CampaignSpec, index: ComponentIndex, examples: Examples, identity: Mapping[str, Any], rows: int
) -> int:
    """Returns the bytes of a finished campaign store of so many rows. Cost: an empty store in memory.

    With the copy of the outputs, where the spec asks for one (`compact`), but for its small files.
    Left out: what workers write about themselves, some hundred bytes each.
    """
    store = MemoryStore()
    CampaignStore.create(
        store,
        header=_header(spec, index, identity),
        components=index.columns,
        examples=examples.columns(),
        rows=rows,
        block_rows=spec.settings.block_rows,
    )
    copied = 4 * rows * len(examples) if spec.settings.compact else 0
    return _finished_bytes(store) + copied


def attribution_bytes(
    spec: CampaignSpec, index: ComponentIndex, examples: Examples, identity: Mapping[str, Any], block: int, way: str
) -> int:
    """Returns the bytes of a finished attribution store in blocks of so many examples; cost as for a campaign."""
    store = MemoryStore()
    AttributionStore.create(
        store,
        header=_header(spec, index, identity),
        components=index.columns,
        examples=examples.columns(),
        block_examples=block,
        quality=GRADIENT_QUALITY if way == "gradient" else REGRESSION_QUALITY["ridge"],
    )
    return _finished_bytes(store)


def _header(spec: CampaignSpec, index: ComponentIndex, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "identity": dict(identity),
        "spec": spec.describe(),
        "loadable": spec.loadable,
        "index": index.to_json(),
    }


def _finished_bytes(store: Store) -> int:
    """Returns what is in an empty store, and what its empty arrays will hold when every block is written."""
    sizes = sync(_sizes(store))
    total = sum(sizes.values())
    group = zarr.open_group(store, mode="r")
    for name, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array) and not any(key.startswith(f"{name}/c/") for key in sizes):
            total += _array_bytes(member)
    return total


async def _sizes(store: Store) -> dict[str, int]:
    return {key: await store.getsize(key) async for key in store.list()}


def _array_bytes(array: zarr.Array[Any]) -> int:
    """Returns the bytes of a written array: whole chunks, uncompressed, as zarr writes them at the edges, too."""
    checks = sum(_CHECKSUM for codec in array.compressors if isinstance(codec, Crc32cCodec))
    chunk = math.prod(array.chunks) * array.dtype.itemsize + checks
    unit = array.shards or array.chunks
    files = math.prod(-(-length // size) for length, size in zip(array.shape, unit, strict=True))
    if array.shards is None:
        return files * chunk
    inner = math.prod(array.shards) // math.prod(array.chunks)
    return files * (inner * (chunk + _PLACE) + _CHECKSUM)
