"""`coar demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coar.cli.common import say
from coar.demo import run_demo


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
