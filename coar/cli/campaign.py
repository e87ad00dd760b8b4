"""Commands around campaigns: what would be ablated, running, fitting."""

from __future__ import annotations

from typing import Annotated

import typer

import ablate
import coar
from ablate.campaign.spec import on_device
from coar.cli.common import (
    AcceptCode,
    AcceptVersions,
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
from coar.cli.logs import Curves, LogFormat, LogLines, LogTarget, logging_to
from coar.cli.storage import Storage, both_located, storage_options
from coar.cli.workers.command import Workers, with_workers
from coar.cli.workers.spread import Outcome, open_campaign
from coar.planning.unablated import unablated_accuracy
from stores.maintenance.compact import make_copies


def index(
    spec: SpecFile,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also run two examples: how is each module gated, and why?")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the components of a spec's model, what is left out, and how often the model is right.

    The accuracy is that of the model as it is, on at most 1,024 of the spec's examples.
    """
    campaign = ablate.CampaignSpec.from_file(spec)
    with ablate.preserved_random_state():
        model, examples = campaign.load()
    found = campaign.make_index(model)
    unablated = unablated_accuracy(model, examples, output_key=campaign.settings.output_key)
    gating = None
    if explain:
        engine = campaign.make_engine(model, found, examples)
        engine.check(examples)
        gating = engine.explain()
    if as_json:
        facts = {"components": len(found), "hash": found.hash, "modules": records(found.modules())}
        facts["unablated"] = None if unablated is None else unablated.as_dict()
        print_json(facts if gating is None else {**facts, "gating": records(gating)})
        return
    say(f"{len(found):,} components in {len(found.ports)} modules; index {found.hash[:12]}", found.modules())
    if len(found.left_out()):
        say("Left out:", found.left_out())
    if unablated is not None:
        say(unablated.text())
    if gating is not None:
        say("How each module is gated:", gating[["module", "used by", "activation gating", "notes"]])


@with_workers
def run_campaign(
    spec: SpecFile,
    workers: Workers,
    store: Annotated[str | None, typer.Option(help="Where to store it; default: the spec's `store`.")] = None,
    accept_versions: AcceptVersions = False,
    accept_code: AcceptCode = False,
    storage: Storage = None,
    log: LogTarget = None,
    log_format: LogLines = LogFormat.text,
    tensorboard: Curves = None,
    quiet: Quiet = False,
) -> None:
    """Run a campaign into its store, or go on where it stopped.

    Started several times at once, here or on many machines, the same command
    shares the work. A block that fails three times is set aside: exit code 3.
    """
    loaded = ablate.CampaignSpec.from_file(spec).with_storage(storage_options(storage))
    place = store if store is not None else loaded.settings.store
    outcome = Outcome.HERE
    with logging_to(log, log_format, tensorboard, quiet):
        if place is not None:
            outcome = workers.spread(spec, loaded, place, open_campaign, ("ablate", "row"), not quiet)
        if outcome is Outcome.SUBMITTED:
            return
        if outcome is Outcome.DONE and place is not None:
            campaign = open_campaign(loaded, place)
            if loaded.settings.compact:
                make_copies(campaign.location)
        else:
            loaded = on_device(loaded, workers.device)
            campaign = ablate.run(
                loaded,
                store,
                progress=not quiet,
                accept_versions=accept_versions,
                accept_code=accept_code,
                **workers.sharing,
            )
    say(f"Complete: {campaign.rows:,} rows x {campaign.example_count:,} examples in {campaign.where}")


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
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit one linear attribution per example to a campaign's finished rows."""
    target = out if out is not None else f"{store.rstrip('/').removesuffix('.zarr')}-attributions.zarr"
    fitted = coar.fit(
        *both_located(storage, store, target),
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
