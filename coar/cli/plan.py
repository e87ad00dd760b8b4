"""The command that says what a spec would cost, before anything runs."""

from __future__ import annotations

from typing import Annotated

import typer

from ablate import CampaignSpec
from coar.cli.common import Json, SpecFile, print_json, say
from coar.cli.storage import Storage, storage_options
from coar.planning import SECONDS, plan


def plan_spec(
    spec: SpecFile,
    store: Annotated[
        str | None, typer.Option(help="Where the campaign is, or would be; default: the spec's `store`.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Processes or devices that share the work, each as fast as this.")
    ] = 1,
    target: Annotated[
        float | None, typer.Option(help="A correlation to reach: plan for the rows and passes that it takes, too.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=3600, help="About how long passes are timed, on a CPU.")
    ] = SECONDS,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Say what a spec would cost and how good it may get, by regression and by gradients.

    Runs nothing but a few timed passes on this machine, and writes nothing.
    Where stores of the spec exist, it says what is left to do.
    """
    loaded = CampaignSpec.from_file(spec).with_storage(storage_options(storage))
    found = plan(loaded, store=store, workers=workers, target=target, seconds=seconds)
    if as_json:
        print_json(found.as_dict())
    else:
        say(found.text())
