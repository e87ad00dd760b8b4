"""Where estimates go: the store of this very estimate is gone on with, another one is refused or replaced."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from zarr.abc.store import Store

from ablate.campaign.identity import Identity, require_same
from stores import AttributionStore, DamagedBlockError, OldFormatError, StoreMismatchError, StoreNotFoundError
from stores.format.groups import Location
from stores.storage.creating import clear
from stores.storage.drafts import draft_of
from stores.storage.places import resolve


def open_same(
    place: Location,
    identity: Identity,
    overwrite: bool,
    *,
    accept_versions: bool = False,
    accept_code: bool = False,
) -> AttributionStore | None:
    """Returns the store of this very estimate, or None if there is none: nothing, or another that may be replaced.

    Other versions of the packages may round differently: they are refused where something is left to compute, unless
    `accept_versions`. A network that is written in another way is refused unless `accept_code`.
    """
    try:
        store = AttributionStore.open(place, finish=True)
    except StoreNotFoundError:
        return None
    except (DamagedBlockError, OldFormatError):
        if overwrite:
            return None
        raise
    try:
        require_same(
            f"Attribution store {store.where}",
            store.header["identity"],
            identity,
            lambda: "Name another store, or replace this one with overwrite=True (`--overwrite`).",
            finished=not store.missing_blocks(),
            accept_versions=accept_versions,
            accept_code=accept_code,
        )
    except StoreMismatchError:
        if overwrite:
            return None
        raise
    return store


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
        aside = draft_of(found)  # swept by the next store made here
        os.rename(found, aside)
        found = aside
    shutil.rmtree(found)
