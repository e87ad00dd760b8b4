"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 failed while running, 2 bad input, 3 not finished, 4 the store belongs to something else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

import ablate
import coar
import stores
from ablate.errors import BAD_INPUT, FAILED, MISMATCH, NOT_FINISHED
from coar.cli import campaign as cli_campaign
from coar.cli import compact as cli_layout
from coar.cli import estimate as cli_estimate
from coar.cli import fraction as cli_fraction
from coar.cli import interchange as cli_interchange
from coar.cli import maintenance as cli_care
from coar.cli import plan as cli_plan
from coar.cli import queries as cli_queries
from coar.cli import status as cli_status
from coar.cli.common import say
from coar.cli.editing import command as cli_edit
from coar.cli.editing import info as cli_edit_info
from coar.cli.workers.flags import OptionalRay
from coar.cli.workers.stopping import hear_interrupts
from coar.demo import run_demo

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
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


@app.command(rich_help_panel="Start here")
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything it writes.", show_default="runs/demo, or runs/demo-quick", metavar="PATH"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of data, training and keep-vectors.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Some seconds: few keep-vectors, rough attributions.")] = False,
) -> None:
    """Run the main job on real handwritten digits: ablate, attribute, ask, edit, report."""
    run_demo(out or Path("runs/demo-quick" if quick else "runs/demo"), seed, say, quick=quick)


PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Start here": {"index": cli_campaign.index},
    "Run a campaign and fit it": {
        "plan": cli_plan.plan_spec,
        "choose-fraction": cli_fraction.choose_fraction,
        "ablate": cli_campaign.run_campaign,
        "status": cli_status.status,
        "fit": cli_campaign.fit_campaign,
    },
    "Or estimate from the model, without a campaign": {"estimate": cli_estimate.estimate_spec},
    "Judge and ask": {
        "evaluate": cli_queries.evaluate,
        "top": cli_queries.top,
        "nearest": cli_queries.nearest,
        "compare": cli_queries.compare,
    },
    "Look after stores": {
        "verify": cli_care.verify,
        "repair": cli_care.repair,
        "migrate": cli_care.migrate,
        "compact": cli_layout.compact,
    },
    "Exchange with other programs": {
        "export": cli_interchange.export_attributions,
        "import": cli_interchange.import_files,
    },
    "Edit and report": {
        "edit": cli_edit.edit,
        "edit-info": cli_edit_info.edit_info,
        "report": cli_queries.report,
    },
}
for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel, cls=OptionalRay)(command)


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
