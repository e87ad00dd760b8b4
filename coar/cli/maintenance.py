"""Commands that look after stores: reading all back, forgetting what is damaged, bringing old ones up to date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import stores
from ablate.errors import FAILED
from coar.cli.common import Json, Quiet, print_json, say
from coar.cli.storage import Storage, located

if TYPE_CHECKING:
    from stores.maintenance.verify import Told

AnyStore = Annotated[str, typer.Argument(metavar="STORE", help="A campaign or attribution store.")]


def verify(store: AnyStore, storage: Storage = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Read back everything in a store and name what is damaged; changes nothing. Exit code 1 if anything is."""
    with _Reading(not quiet) as told:
        report = stores.verify(located(storage, store), on_block=told)
    if as_json:
        print_json(report.as_dict())
    else:
        say(report.text())
    if not report.sound:
        raise typer.Exit(FAILED)


def repair(
    store: AnyStore,
    force: Annotated[bool, typer.Option("--force", help="Also while workers are at it.")] = False,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Forget the damaged blocks of a store; then run the same command again. Exit code 1 if some damage stays."""
    with _Reading(not quiet) as told:
        done = stores.repair(located(storage, store), force=force, on_block=told)
    if as_json:
        print_json(done.as_dict())
    else:
        say(done.text())
    if done.left:
        raise typer.Exit(FAILED)


def migrate(store: AnyStore, storage: Storage = None, as_json: Json = False) -> None:
    """Bring a store that an older version wrote to this version's format. No number is changed."""
    done = stores.migrate(located(storage, store))
    if as_json:
        print_json({"store": done.where, "before": done.before, "after": done.after})
    else:
        say(done.text())


class _Reading:
    """A progress bar over the blocks of a store, whose number is known only when it is open."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._bar: Any = None

    def __enter__(self) -> Told:
        return self._told

    def _told(self, done: int, total: int) -> None:
        if self._bar is None:
            from ablate.work.progress import progress_bar

            self._bar = progress_bar("read back", total, 0, "block", self._show)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
