"""The command that says what is in an edit's file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import coar
from coar.cli.common import Json, print_json, records, say
from coar.editing.edits.edit import Edit
from coar.editing.edits.files import read_edit_file
from coar.editing.edits.parts import Parts


def facts_of(found: Edit) -> dict[str, Any]:
    """Returns an edit as JSON-able values."""
    return {
        "method": found.method,
        "operation": found.operation.name,
        "alpha": found.alpha,
        "base": found.base,
        "index": found.selection.index.hash,
        "components": len(found.selection),
        "of": len(found.selection.index),
        "ids": list(found.selection.ids),
        "changes": records(found.describe()),
        "parts": records(_parts(found.operation)) if isinstance(found.operation, Parts) else [],
        "details": dict(found.details),
    }


def edit_info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An edit (.safetensors) that `coar edit` wrote.")],
    as_json: Json = False,
) -> None:
    """Show what an edit file touches, how much, and how it was found. No model is needed; nothing is run."""
    found = coar.load_edit(file)
    stored = read_edit_file(file)
    if as_json:
        print_json({"edit": str(file), "bytes": file.stat().st_size, "checksum": stored.checked, **facts_of(found)})
        return
    base = "any model of its index" if found.base is None else f"the model with weights {found.base[:12]}"
    checksum = "its checksum fits" if stored.checked else f"no checksum (format {stored.header['format_version']})"
    say(f"{found!r}, for {base}; {file.stat().st_size:,} bytes, {checksum}.")
    if found.operation.end_points:
        say(
            "It holds end points, not differences: other weights it fits only if it is loaded with its model, "
            "coar.load_edit(file, base=model)."
        )
    if isinstance(found.operation, Parts):
        say("Its parts, in their order:", _parts(found.operation))
    say("What it changes; relative_change: norm of the change over the norm of what was there.", found.describe())
    settings = {
        name: value for name, value in found.details.items() if isinstance(value, (str, int, float, type(None)))
    }
    if settings:
        say(
            "How it was found:", pd.DataFrame({"setting": list(settings), "value": [str(v) for v in settings.values()]})
        )
    log = found.details.get("log")
    if isinstance(log, dict):
        facts = {name: value for name, value in log.items() if isinstance(value, (str, int, float))}
        say("Its search:", pd.DataFrame({"what": list(facts), "value": [str(v) for v in facts.values()]}))


def _parts(operation: Parts) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": part.method,
            "operation": part.operation.name,
            "alpha": part.alpha,
            "components": len(part.selection),
            "made for": "any model" if part.base is None else part.base[:12],
        }
        for part in operation.parts
    )
