"""The option by which every command that opens a store says how object storage is reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stores.storage.places import Location

Value = str | int | float | bool
Storage = Annotated[
    list[str] | None,
    typer.Option(
        "--storage",
        metavar="NAME=VALUE",
        help="Option of object storage, before the spec's: endpoint=https://..., region=...; repeatable. Never a "
        "credential: those are taken from the environment.",
    ),
]


def storage_options(given: list[str] | None) -> dict[str, Value]:
    """Returns options as a spec's table `storage` has them, from NAME=VALUE each."""
    found: dict[str, Value] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"--storage: got {name!r}, expected NAME=VALUE, e.g. region=eu-central-1")
        found[name.strip()] = _value(value.strip())
    return found


def located(storage: list[str] | None, place: str) -> Location:
    """Returns a place as the library takes it: on object storage with the options given.

    Raises:
      StoreError: Options beside a place that they do not belong to, or options that are wrong.
    """
    from stores.storage.places import resolve

    options = storage_options(storage)
    return resolve(place, options) if options else place


def both_located(storage: list[str] | None, one: str, two: str) -> tuple[Location, Location]:
    """Returns two places, of which one at least is on object storage if there are options; raises as `located`."""
    from stores.storage.places import is_remote

    remote = [is_remote(place) for place in (one, two)]
    first = located(storage if remote[0] or not remote[1] else None, one)
    return first, located(storage if remote[1] else None, two)


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
