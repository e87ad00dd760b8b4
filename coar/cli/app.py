"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 failed while running, 2 bad input, 3 not finished, 4 the store belongs to something else.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

import ablate
import coar
import stores
from ablate.errors import BAD_INPUT, FAILED, MISMATCH, NOT_FINISHED
from coar.cli.on_demand import CommandsOnDemand
from coar.cli.workers.stopping import hear_interrupts

PANELS = {
    "Start here": {"demo": "coar.cli.demo:demo", "index": "coar.cli.campaign:index"},
    "Run a campaign and fit it": {
        "plan": "coar.cli.plan:plan_spec",
        "choose-fraction": "coar.cli.fraction:choose_fraction",
        "ablate": "coar.cli.campaign:run_campaign",
        "status": "coar.cli.status:status",
        "fit": "coar.cli.campaign:fit_campaign",
    },
    "Or estimate from the model, without a campaign": {"estimate": "coar.cli.estimate:estimate_spec"},
    "Judge and ask": {
        "evaluate": "coar.cli.queries:evaluate",
        "top": "coar.cli.queries:top",
        "nearest": "coar.cli.queries:nearest",
        "compare": "coar.cli.queries:compare",
    },
    "Look after stores": {
        "verify": "coar.cli.maintenance:verify",
        "repair": "coar.cli.maintenance:repair",
        "migrate": "coar.cli.maintenance:migrate",
        "compact": "coar.cli.compact:compact",
    },
    "Exchange with other programs": {
        "export": "coar.cli.interchange:export_attributions",
        "import": "coar.cli.interchange:import_files",
    },
    "Edit and report": {
        "edit": "coar.cli.editing.command:edit",
        "edit-info": "coar.cli.editing.info:edit_info",
        "report": "coar.cli.queries:report",
    },
}


class Commands(CommandsOnDemand):
    """All commands of `coar`."""

    panels = PANELS


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which parts of this network made that prediction, and what happens if I change them?",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"coar {version('component-attribution')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Tells which parts of a network made a prediction, and what happens without them."""


def main() -> None:
    """Runs the command line; turns errors of the toolkit into a message and an exit code."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # a spec's `factory` may be a module of the working directory, as with `python -m`
    hear_interrupts()
    try:
        app()
    except stores.StoreMismatchError as error:
        _fail(error, MISMATCH)
    except stores.UnfinishedStoreError as error:
        _fail(error, NOT_FINISHED)
    except (ablate.NonFiniteOutputError, ablate.OutOfMemoryError, stores.DamagedBlockError) as error:
        _fail(error, FAILED)
    except (ablate.AblateError, stores.StoreError, coar.CoarError) as error:
        _fail(error, BAD_INPUT)
    except OSError as error:  # e.g. a place where nothing may be written
        _fail(error, FAILED)


def _fail(error: Exception, code: int) -> None:
    print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)  # noqa: T201
    sys.exit(code)
