"""The command that lays a store out anew for its readers."""

from __future__ import annotations

from typing import Annotated

import typer

from coar.cli.common import Json, MemoryGiB, Quiet, print_json, say
from coar.cli.storage import Storage, located


def compact(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A finished campaign or attribution store.")],
    copies: Annotated[
        str | None,
        typer.Option(help="row, column or row,column; default: column of a campaign, both of attributions."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove all copies instead; the data stays.")] = False,
    memory_gib: MemoryGiB = 1.0,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add copies of a finished store from which single rows and columns are read in a few milliseconds.

    A row is all of one example's attributions, or one keep-vector's outputs; a column is all examples of one component,
    or all outputs of one example. The data stays as it is and is what everything else reads; it is checked first.
    """
    from ablate.work.progress import progress_bar
    from stores.maintenance.compact import make_copies, remove_copies

    place = located(storage, store)
    if remove:
        count = remove_copies(place)
        if as_json:
            print_json({"store": store, "removed": count})
        else:
            say(f"{count} {'copy' if count == 1 else 'copies'} removed from {store}.")
        return
    kinds = None if copies is None else [kind.strip() for kind in copies.split(",") if kind.strip()]
    with progress_bar("copy", 1, 0, "B", not quiet) as bar:
        bar.unit_scale = True

        def told(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        made = make_copies(place, kinds, memory=int(memory_gib * 2**30), on_bytes=told)
    if as_json:
        print_json({"store": store, "copies": [vars(copy) for copy in made]})
        return
    for copy in made:
        state = "made and checked" if copy.made else "was there already"
        say(f"{copy.kind} copy {state}: {copy.files:,} files, {copy.bytes / 2**20:,.1f} MiB in {store}")
