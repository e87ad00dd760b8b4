"""Forgetting what is damaged in a store, so that the next run computes it anew."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from stores.blocks.copies import FOLDER as COPIES
from stores.blocks.copies import MARK
from stores.format.groups import Location
from stores.format.layout import COPY_KINDS
from stores.maintenance.verify import COPY, METADATA, Damage, Report, Told, known_nodes, verify
from stores.opening import OpenStore, open_any
from stores.storage import objects
from stores.work.liveness import StoreBusyError, live_workers
from stores.work.worklog import WorkLog

DAY = 24 * 3600.0


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
      found: What was there before.
      forgotten: The blocks that are no longer finished: the next run computes them anew.
      rewritten: Files whose content was known elsewhere in the store, and written anew.
      removed: Files that were deleted beside the forgotten blocks.
      left: What could not be repaired.
    """

    found: Report
    forgotten: tuple[int, ...]
    rewritten: tuple[str, ...]
    removed: tuple[str, ...]
    left: tuple[Damage, ...]

    def text(self) -> str:
        """Returns it as sentences."""
        where = self.found.where
        if self.found.sound and not self.removed:
            return f"{where}: nothing to repair."
        numbers = ", ".join(map(str, self.forgotten))
        lines = [f"{where}: {_count(self.forgotten, 'damaged block')} forgotten{f': {numbers}' if numbers else ''}."]
        if self.forgotten:
            them = "it" if len(self.forgotten) == 1 else "them"
            lines.append(f"Run the same command again: it computes {them} anew, and nothing else.")
        lines += [f"Written anew from the root's metadata: {file}" for file in self.rewritten]
        if self.removed:
            lines.append(f"{_count(self.removed, 'leftover')} removed.")
        lines += [f"Beyond repair: {damage}" for damage in self.left]
        if self.left:
            lines.append("Restore the store from a copy, or run again into a new one.")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON-able values."""
        return {**asdict(self), "found": self.found.as_dict()}


def repair(location: Location, *, force: bool = False, on_block: Told = lambda done, total: None) -> Repair:
    """Forgets the damaged blocks of a store, so that the next run computes them anew, and returns what was done.

    Sound blocks are not touched. Removes what unfinished work of workers has left, and copies that no longer fit;
    writes damaged metadata of single arrays anew from the root's.

    Args:
      location: A campaign or attribution store.
      force: Also while workers are at it; then what looks left over stays: it may be theirs.
      on_block: As for `verify`.

    Cost: that of `verify`. Where a worker of another machine may be alive, it is watched for a minute first.

    Raises:
      StoreBusyError: Workers are at it.
      OldFormatError: It is of an older format: `coar migrate` first.
      StoreNotFoundError, StoreUnreadableError: As for `verify`.
    """
    store = open_any(location, "r+")
    log = WorkLog(store.blocks.store)
    if not force:
        _require_idle(log, store.where)
    found = verify(location, on_block=on_block)
    nodes = known_nodes(store)
    for block in found.damaged_blocks:
        store.blocks.forget(block)
    rewritten = [_rewrite(store, nodes, damage) for damage in found.damages if damage.what == METADATA]
    # those who write without being workers, as `coar fit` does, leave no record; nobody knows whether they live
    idle = not force and bool(log.workers())
    removed = sorted({*_old_copies(found, store), *(found.leftovers if idle else ())})
    for key in removed:
        _remove(store.blocks.store, key)
    for key in found.partials:
        if idle or _age(store.blocks.store, key) > DAY:
            objects.delete(store.blocks.store, key)
            removed.append(key)
    left = tuple(damage for damage in found.damages if not damage.repairable)
    return Repair(found, tuple(found.damaged_blocks), tuple(rewritten), tuple(removed), left)


def _require_idle(log: WorkLog, where: str) -> None:
    busy = live_workers(log)
    if busy:
        names = ", ".join(record.id for record in busy[:3])
        count = "1 worker is" if len(busy) == 1 else f"{len(busy)} workers are"
        raise StoreBusyError(
            f"{where}: {count} at it ({names}). Wait for them or stop them first. With --force (force=True) it is "
            "repaired all the same."
        )


def _rewrite(store: OpenStore, nodes: dict[str, Any], damage: Damage) -> str:
    """Writes the metadata of an array or group as the root has them; returns the file."""
    key = damage.files[0].removeprefix(f"{store.where}/")
    node = {name: value for name, value in nodes[str(Path(key).parent)].items() if name != "consolidated_metadata"}
    objects.replace(store.blocks.store, key, json.dumps(node, indent=2).encode())
    objects.flush(store.blocks.store, [key])
    return damage.files[0]


def _old_copies(found: Report, store: OpenStore) -> list[str]:
    """Returns the folders of copies that are damaged, or belong to no ledger that is there now."""
    broken = any(damage.what == COPY for damage in found.damages)
    if not broken and not found.damaged_blocks:
        return []
    names = objects.names(store.blocks.store, COPIES)
    return [f"{COPIES}/{name}" for name in names if name.partition("-")[0] in COPY_KINDS]


def _remove(store: Store, key: str) -> None:
    """Deletes an object, or the folder of a copy, whose mark goes first so that nobody begins to read it."""
    if key.startswith(f"{COPIES}/"):
        objects.delete(store, f"{key}/{MARK}")
        sync(store.delete_dir(key))
    else:
        objects.delete(store, key)


def _age(store: Store, key: str) -> float:
    """Returns how long ago a file was written, in seconds; 0 where that cannot be told."""
    try:
        return time.time() - (Path(store.root) / key).stat().st_mtime if isinstance(store, LocalStore) else 0.0
    except FileNotFoundError:  # its writer has finished
        return 0.0


def _count(things: tuple[object, ...], name: str) -> str:
    """Returns how many there are, as the subject of a sentence in the past."""
    return f"1 {name} was" if len(things) == 1 else f"{len(things) or 'no'} {name}s were"
