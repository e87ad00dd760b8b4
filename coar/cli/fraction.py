"""The command that measures which ablate fraction suits a spec's network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import coar
from coar.cli.common import Json, SpecFile, print_json, say
from coar.errors import QueryError
from coar.report import plots


def choose_fraction(
    spec: SpecFile,
    most_examples: Annotated[int, typer.Option(min=1, help="Of more examples, so many are run, evenly spaced.")] = 100,
    figure: Annotated[Path | None, typer.Option(help="Also draw it, into this file (.png, .svg, .pdf, ...).")] = None,
    as_json: Json = False,
) -> None:
    """Measure what share of components to ablate: the network still works, and a line still explains it.

    Runs about 200 forwards of the spec's examples. The spec's own ablate
    fraction is not looked at, and nothing is changed: write the one
    recommended into the spec.
    """
    if figure is not None and figure.suffix.lstrip(".").lower() not in plots.formats():
        raise QueryError(f"--figure is {figure}, expected a name that ends in .{', .'.join(plots.formats())}.")
    found = coar.choose_fraction(spec, most_examples=most_examples)
    if figure is not None:
        found.figure().savefig(figure)
    if as_json:
        print_json(found.as_dict())
        return
    title = f"{found.components:,} components, {found.examples} examples, {found.forwards} forwards of all of them."
    table = found.table().astype({"ablate_fraction": str})  # 0.0003 would be said as 0.000
    say(title, table)
    say(f"Recommended: {found.reason}")
