"""Commands that write files for other programs, and read theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import coar
from coar.cli.common import AttributionsPath, Json, Quiet, print_json, say
from coar.cli.storage import Storage, located

ABOUT = "What the numbers are about"
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def export_attributions(
    attributions: AttributionsPath,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[
        str | None, typer.Option(help="parquet, npz, csv or pt; default: by the ending of --out.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", help="parquet and csv: only the k strongest components of each example.")
    ] = None,
    overwrite: Replace = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Write attributions as Parquet, NPZ, CSV, or .pt as the published code has it."""
    from coar.interchange.exporting import export, sidecar

    path = export(located(storage, attributions), out, format, k=k, overwrite=overwrite)  # type: ignore[arg-type]  # checked there
    beside = [other for name in ("components", "examples") if (other := sidecar(path, name)).exists()]
    written = [path, *(beside if path.suffix in (".parquet", ".csv") else [])]
    sizes = {str(file): file.stat().st_size for file in written}
    if as_json:
        print_json({"attributions": attributions, "files": sizes})
        return
    say("Written: " + ", ".join(f"{file} ({size:,} bytes)" for file, size in sizes.items()))


def import_files(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of the published code (masks.npy, *_margins.npy, _completed.npy), or an attribution file "
            "(.pt, .npz).",
        ),
    ],
    out: Annotated[str, typer.Option(help="The store to write.")],
    spec: Annotated[
        Path | None,
        typer.Option(help="A spec with the model, data and components of the files.", rich_help_panel=ABOUT),
    ] = None,
    components: Annotated[
        Path | None,
        typer.Option(help="Without a spec: a component index, as CSV or JSON.", rich_help_panel=ABOUT),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="Without a spec: a CSV table with id, label, group.", rich_help_panel=ABOUT),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Without a spec: what was measured; default: margin.", rich_help_panel=ABOUT)
    ] = None,
    true_means: Annotated[
        str | None,
        typer.Option(help="What True means in the masks: kept (default) or ablated.", rich_help_panel=ABOUT),
    ] = None,
    ablate_fraction: Annotated[
        str | None,
        typer.Option(
            help="Share of components ablated: masks are checked against it, and it gives attributions the units of "
            "the output. Of attributions also: unknown.",
            rich_help_panel=ABOUT,
        ),
    ] = None,
    not_standardised: Annotated[
        bool,
        typer.Option(
            "--not-standardised",
            help="Attributions that are in units of the output already, not per standard deviation of the masks.",
            rich_help_panel=ABOUT,
        ),
    ] = False,
    on_nan: Annotated[
        str | None,
        typer.Option(help="Examples with NaN or infinity: drop, or keep without an attribution; default: refuse."),
    ] = None,
    margins: Annotated[str | None, typer.Option(help="Of a folder with several: e.g. val_margins.")] = None,
    assume_completed: Annotated[
        bool, typer.Option("--assume-completed", help="Of a folder without _completed.npy: take all rows.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other attributions.")] = False,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read a campaign or attributions of the published code into a store, checked."""
    from coar.attributions.attributions import OTHER_UNITS
    from coar.interchange import InterchangeError, import_attributions, import_campaign
    from coar.interchange.incumbent import MASKS
    from coar.interchange.units import UNKNOWN

    about: dict[str, Any] = {"spec": spec, "components": components, "examples": examples, "output": output}
    fraction = _fraction(ablate_fraction)
    about |= {"true_means": true_means, "ablate_fraction": fraction, "on_nan": on_nan, "progress": not quiet}
    place = located(storage, out)
    if (source / MASKS).exists():
        if overwrite:
            raise InterchangeError("--overwrite is for attributions only: delete a campaign yourself, or name another.")
        if not_standardised or fraction == UNKNOWN:
            raise InterchangeError(
                f"{source} is a campaign: its outputs have their own units, and its masks say what was ablated. Leave "
                "out --not-standardised and --ablate-fraction unknown."
            )
        campaign = import_campaign(source, place, margins=margins, assume_completed=assume_completed, **about)
        identity = campaign.header["identity"]
        facts = {
            "store": out,
            "kind": "campaign",
            "rows": campaign.rows,
            "left_out": identity["imported"]["rows_in_files"] - campaign.rows,
            "examples": campaign.example_count,
            "components": campaign.component_count,
            "ablate_fraction": identity["plan"]["ablate_fraction"],
            "examples_dropped": identity["imported"].get("drop", 0),
        }
        text = (
            f"{campaign.rows:,} rows x {campaign.example_count:,} examples, {campaign.component_count:,} components, "
            f"{facts['ablate_fraction']:.4g} ablated, in {out}. Left out as not completed: {facts['left_out']:,} rows."
            f"{_without(facts['examples_dropped'], 'left out')}"
        )
    else:
        if margins is not None or assume_completed:
            raise InterchangeError(
                f"--margins and --assume-completed are for a folder with {MASKS}, and {source} has none."
            )
        found: coar.Attributions = import_attributions(
            source, place, overwrite=overwrite, standardised=not not_standardised, **about
        )
        width, dropped = found.store.component_count, found.header["identity"]["imported"].get("drop", 0)
        facts = {"store": out, "kind": "attributions", "examples": len(found), "components": width}
        facts |= {"in_output_units": found.in_output_units}
        facts |= {"examples_dropped": dropped, "examples_without_attribution": len(found.lacking)}
        units = "" if found.in_output_units else f" Weights are {OTHER_UNITS}: predictions will be refused."
        text = (
            f"{len(found):,} attributions of {width:,} components in {out}. Quality: {found.quality_text()}.{units}"
            f"{_without(dropped, 'left out')}{_without(len(found.lacking), 'kept without an attribution')}"
        )
    if as_json:
        print_json(facts)
    else:
        say(text)


def _fraction(text: str | None) -> Any:
    """Returns a number where the text is one; what is no fraction is refused where it is used."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _without(count: int, how: str) -> str:
    """Returns what became of examples whose numbers are not finite, as a sentence; "" if there are none."""
    return f" {count:,} {'example' if count == 1 else 'examples'} with NaN or infinity {how}." if count else ""
