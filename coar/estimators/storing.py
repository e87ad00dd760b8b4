"""Where estimates go: the store of this very estimate is gone on with, another one is refused or replaced."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zarr.abc.store import Store

import stores
from ablate.campaign import VERSIONS_ADVICE
from stores import AttributionStore, DamagedBlockError, OldFormatError, StoreMismatchError, StoreNotFoundError
from stores.creating import clear
from stores.places import resolve
from stores.schema import Location


def open_same(
    place: Location, identity: Mapping[str, Any], overwrite: bool, accept_versions: bool = False
) -> AttributionStore | None:
    """Returns the store of this very estimate, or None if there is none: nothing, or another that may be replaced.

    Other versions of the packages may round differently: they are refused where something is left to compute, unless
    `accept_versions`.
    """
    try:
        store = AttributionStore.open(place, finish=True)
    except StoreNotFoundError:
        return None
    except (DamagedBlockError, OldFormatError):
        if overwrite:
            return None
        raise
    found = stores.differences(store.header["identity"], identity)
    if accept_versions or not store.missing_blocks():
        found = [difference for difference in found if not difference.key.startswith("versions.")]
    if not found:
        return store
    if not overwrite:
        raise StoreMismatchError(
            f"Attribution store {store.where}",
            found,
            "Name another store, or replace this one with overwrite=True (`--overwrite`)."
            + (" " + VERSIONS_ADVICE if all(d.key.startswith("versions.") for d in found) else ""),
        )
    return None


def remove(place: Location) -> None:
    """Deletes an attribution store, damaged or of an older format, too, if there is one; raises for anything else.

    A reader never sees a part of it as data: a folder goes in one step, in other stores the marks go first.
    """
    with suppress(DamagedBlockError, OldFormatError):
        try:
            AttributionStore.open(place, finish=True)
        except StoreNotFoundError:
            return
    found = resolve(place)
    if isinstance(found, Store):
        clear(found)
        return
    if not found.is_symlink():  # which rmtree refuses
        aside = found.parent / f".{found.name}.{uuid.uuid4().hex[:8]}.draft"  # swept by the next store made here
        os.rename(found, aside)
        found = aside
    shutil.rmtree(found)
