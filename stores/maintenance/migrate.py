"""Bringing a store of an older format to this one, in one step; no number and no file of numbers changes.

Format 1 kept in the root's header who had computed what (`environments`), and rewrote it for every new worker. Format 2
writes the root once and seals it; workers tell about themselves under `work/workers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zarr.abc.store import Store

from stores.errors import StoreError
from stores.format.groups import Location, open_group
from stores.format.root import FORMAT_VERSION, ROOT, SEAL, read_root, seal_of
from stores.opening import open_any
from stores.records import ENDED, Process, WorkerRecord
from stores.storage import objects
from stores.work.worklog import WORKERS

NOBODY = Process(host="", pid=0, machine="", born="")


@dataclass(frozen=True)
class Migration:
    """What `migrate` did: from which format to which; equal if the store was of this format already."""

    where: str
    before: int
    after: int

    def text(self) -> str:
        """Returns it as a sentence."""
        if self.before == self.after:
            return f"{self.where} has format {self.after} already: nothing to do."
        return f"{self.where}: format {self.before} became format {self.after}. No number was changed."


def migrate(location: Location) -> Migration:
    """Brings a campaign or attribution store to this version's format, and returns what was done.

    Only the root's metadata change, whole or not at all. Older versions of the toolkit do not open the store any more:
    end their runs on it first.

    Raises:
      StoreNotFoundError, StoreUnreadableError: Nothing, or something else, is there, or it is of a newer version.
    """
    opened = open_any(location)
    if isinstance(location, Store) and location.read_only:
        raise StoreError(f"{opened.where} is a store object for reading only. Give one that can be written, or a path.")
    before = int(opened.header["format_version"])
    if before == FORMAT_VERSION:
        return Migration(opened.where, before, before)
    store = opened.blocks.store.with_read_only(False)
    document = read_root(store, opened.where)
    header = document["attributes"]
    for number, environment in enumerate(header.pop("environments", [])):
        _keep_record(store, number, environment)
    header["format_version"] = FORMAT_VERSION
    header[SEAL] = seal_of(document)
    objects.replace(store, ROOT, json.dumps(document, indent=2).encode())
    objects.flush(store, [ROOT])
    open_group(location, header["format"], "r+")
    return Migration(opened.where, before, FORMAT_VERSION)


def _keep_record(store: Any, number: int, environment: Mapping[str, Any]) -> None:
    """Writes what format 1 knew of a worker where format 2 has it, before the header forgets it."""
    name = f"format-1-{number}"
    record = WorkerRecord(name, NOBODY, began="", seen="", facts=dict(environment), state=ENDED)
    objects.create(store, f"{WORKERS}/{name}.json", objects.to_json(asdict(record)))
