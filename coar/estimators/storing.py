"""Where estimates go: the store of this very estimate is gone on with, another one is refused or replaced."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zarr.abc.store import Store
from zarr.core.sync import sync

import stores
from stores import AttributionStore, DamagedBlockError, StoreMismatchError, StoreNotFoundError
from stores.schema import Location


def open_same(place: Location, identity: Mapping[str, Any], overwrite: bool) -> AttributionStore | None:
    """Returns the store of this very estimate, or None if there is none: nothing, or another that may be replaced."""
    try:
        store = AttributionStore.open(place, finish=True)
    except StoreNotFoundError:
        return None
    except DamagedBlockError:
        if overwrite:
            return None
        raise
    found = stores.differences(store.header["identity"], identity)
    if not found:
        return store
    if not overwrite:
        raise StoreMismatchError(
            f"Attribution store {store.where}",
            found,
            "Name another store, or replace this one with overwrite=True (`--overwrite`).",
        )
    return None


def remove(place: Location) -> None:
    """Deletes an attribution store, damaged or not, if there is one; raises for anything else."""
    with suppress(DamagedBlockError):
        try:
            AttributionStore.open(place, finish=True)
        except StoreNotFoundError:
            return
    if isinstance(place, Store):
        sync(place.clear())
    else:
        shutil.rmtree(place)
