"""Commands around campaigns: what would be ablated, running, looking how far it is, fitting."""

from __future__ import annotations

from typing import Annotated

import typer

import ablate
import coar
import stores
from coar.cli_common import (
    NOT_FINISHED,
    CampaignPath,
    Json,
    MemoryGiB,
    Overwrite,
    Quiet,
    SpecFile,
    print_json,
    records,
    say,
)


def index(
    spec: SpecFile,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also run two examples: how is each module gated, and why?")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the components of a spec's model, module by module, and what is left out."""
    campaign = ablate.CampaignSpec.from_file(spec)
    with ablate.preserved_random_state():
        model, examples = campaign.load()
    found = campaign.make_index(model)
    gating = None
    if explain:
        engine = campaign.make_engine(model, found, examples)
        engine.check(examples)
        gating = engine.explain()
    if as_json:
        facts = {"components": len(found), "hash": found.hash, "modules": records(found.modules())}
        print_json(facts if gating is None else {**facts, "gating": records(gating)})
        return
    say(f"{len(found):,} components in {len(found.ports)} modules; index {found.hash[:12]}", found.modules())
    if len(found.left_out()):
        say("Left out:", found.left_out())
    if gating is not None:
        say("How each module is gated:", gating[["module", "used by", "activation gating", "notes"]])


def run_campaign(
    spec: SpecFile,
    store: Annotated[str | None, typer.Option(help="Where to store it; default: the spec's `store`.")] = None,
    accept_versions: Annotated[
        bool, typer.Option("--accept-versions", help="Go on with a store that other package versions wrote.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run a campaign into its store, or go on where it stopped."""
    campaign = ablate.run(spec, store, progress=not quiet, accept_versions=accept_versions)
    say(f"Complete: {campaign.rows:,} rows x {campaign.example_count:,} examples in {campaign.where}")


def status(store: CampaignPath, as_json: Json = False) -> None:
    """Show how far a campaign is. Exit code 3 while it is not finished."""
    campaign = stores.CampaignStore.open(store)
    state = campaign.progress
    facts = {
        "store": campaign.where,
        "complete": state.complete,
        "finished_rows": state.finished_rows,
        "rows": state.rows,
        "finished_blocks": state.finished_blocks,
        "blocks": state.blocks,
        "examples": campaign.example_count,
        "components": campaign.component_count,
        "spec": campaign.header["spec"],
    }
    if as_json:
        print_json(facts)
    else:
        share = state.finished_rows / state.rows
        say(
            f"{campaign.where}: {'complete' if state.complete else 'not finished'}, {state.finished_rows:,} of "
            f"{state.rows:,} rows ({share:.0%}), {state.finished_blocks} of {state.blocks} blocks; "
            f"{campaign.example_count:,} examples, {campaign.component_count:,} components."
        )
    if not state.complete:
        raise typer.Exit(NOT_FINISHED)


def fit_campaign(
    store: CampaignPath,
    out: Annotated[
        str | None, typer.Option(help="Where to write; default: STORE with -attributions before .zarr.")
    ] = None,
    method: Annotated[str, typer.Option(help="ridge, ols or lasso.")] = "ridge",
    ridge: Annotated[
        float | None, typer.Option(help="One penalty for all examples; default: chosen per example.")
    ] = None,
    ablate_fraction: Annotated[
        float | None, typer.Option(help="Of a campaign with several, fit the rows of this one; default: all.")
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out/--fit-all", help="Measure quality on every tenth row, or fit all rows.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...: where the heavy products are computed.")] = "cpu",
    memory_gib: MemoryGiB = 2.0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit one linear attribution per example to a campaign's finished rows."""
    target = out if out is not None else f"{store.rstrip('/').removesuffix('.zarr')}-attributions.zarr"
    fitted = coar.fit(
        store,
        target,
        method=method,  # type: ignore[arg-type]  # checked there
        ridge=ridge,
        ablate_fraction=ablate_fraction,
        held_out=held_out,
        device=device,
        memory=int(memory_gib * 2**30),
        overwrite=overwrite,
        progress=not quiet,
    )
    mean = float(fitted.quality["correlation"].mean())
    rows = fitted.header["identity"]["rows"]
    if as_json:
        print_json({"store": target, "rows": rows, "examples": len(fitted), "held_out_correlation": mean})
    else:
        measured = f"Held-out correlation, mean over examples: {fitted.quality_text()}"
        quality = measured if fitted.quality_measured else "No rows were held out."
        say(f"{len(fitted):,} attributions from {rows:,} rows in {target}. {quality}")
