"""What the commands have in common: arguments, exit codes, and how results are printed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A campaign spec (TOML).")]
CampaignPath = Annotated[str, typer.Argument(metavar="STORE", help="A campaign store.")]
AttributionsPath = Annotated[str, typer.Argument(metavar="ATTRIBUTIONS", help="An attribution store.")]
MemoryGiB = Annotated[float, typer.Option(min=0.01, max=1e6, help="Memory budget in GiB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace attributions that were estimated otherwise.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Call the functions that the store names as factory. Only if you trust it.")
]
AcceptVersions = Annotated[
    bool, typer.Option("--accept-versions", help="Go on with a store that other package versions wrote.")
]
AcceptCode = Annotated[
    bool,
    typer.Option(
        "--accept-code", help="Go on with a store whose network was written in another way, if it computes the same."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]

# Ids and groups are the user's: no markup, no emoji in them.
_plain: Any = {"markup": False, "emoji": False, "highlight": False}


def say(text: str, table: pd.DataFrame | None = None) -> None:
    """Prints a sentence, and a table if there is one, to stdout."""
    from rich.console import Console

    out = Console(**_plain) if sys.stdout.isatty() else Console(width=140, soft_wrap=True, **_plain)
    out.print(text)
    if table is not None:
        out.print(_rich_table(table))


def print_json(value: Any) -> None:
    """Prints JSON to stdout, with null for NaN and infinities."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))  # noqa: T201


def records(table: pd.DataFrame) -> Any:
    """Returns a table as JSON-able values, one dict per row."""
    return json.loads(table.to_json(orient="records"))


def _rich_table(table: pd.DataFrame) -> Table:
    from rich.table import Table

    drawn = Table()
    for name in table.columns:
        numeric = table[name].dtype.kind in "biufc"
        drawn.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False, name=None):
        drawn.add_row(*(_cell(value) for value in row))
    return drawn


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def _finite(value: Any) -> Any:
    """Returns JSON-able values with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
