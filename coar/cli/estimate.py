"""The command that estimates from a model, without a campaign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import ablate
import coar
from ablate.campaign.spec import on_device
from ablate.errors import UnknownNameError
from coar.cli.common import AcceptCode, AcceptVersions, Json, MemoryGiB, Overwrite, Quiet, SpecFile, print_json, say
from coar.cli.logs import Curves, LogFormat, LogLines, LogTarget, logging_to
from coar.cli.storage import Storage, storage_options
from coar.cli.workers.command import Workers, with_workers
from coar.cli.workers.spread import Outcome, open_estimate
from coar.estimators.abstract import Estimator
from coar.estimators.registry import get_estimator

GRADIENT = "Options of the gradient estimator"
Passes = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Forward and backward passes per example, or auto: until --tolerance; default: the spec's, or 100.",
        rich_help_panel=GRADIENT,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="For --passes auto: the share of the variance of predictions that may be error; default: 0.02.",
        rich_help_panel=GRADIENT,
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        help="What else is off while a component is sampled: continuous, mixed or bernoulli (exact; for small "
        "networks); default: continuous up to 0.1 ablated, mixed above.",
        rich_help_panel=GRADIENT,
    ),
]
ForwardRows = Annotated[
    int | None,
    typer.Option(
        help="Also run so many keep-vectors forward, and refine with them; default: 0.", rich_help_panel=GRADIENT
    ),
]


@with_workers
def estimate_spec(
    spec: SpecFile,
    workers: Workers,
    out: Annotated[
        str | None, typer.Option(help="Where to write; default: the spec's `store` with -estimate before .zarr.")
    ] = None,
    method: Annotated[str, typer.Option(help="One of those above.")] = "gradient",
    ablate_fraction: Annotated[
        float | None, typer.Option(help="Share of components that is off on average; default: the spec's.")
    ] = None,
    passes: Passes = None,
    tolerance: Tolerance = None,
    background: Background = None,
    forward_rows: ForwardRows = None,
    quality_rows: Annotated[
        int, typer.Option(min=0, help="Keep-vectors run forward beside it, to measure quality; 0: none.")
    ] = 50,
    block_examples: Annotated[int, typer.Option(min=1, help="Most examples that are estimated together.")] = 256,
    memory_gib: MemoryGiB = 2.0,
    overwrite: Overwrite = False,
    accept_versions: AcceptVersions = False,
    accept_code: AcceptCode = False,
    storage: Storage = None,
    log: LogTarget = None,
    log_format: LogLines = LogFormat.text,
    tensorboard: Curves = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Estimate one linear attribution per example by running the model, or go on where it stopped.

    The spec is that of a campaign; its rows are not needed, and no campaign is
    run. Methods: gradient; to compare with, leave_one_out, gradient_times_gate,
    integrated_gate_gradients, neuron_conductance, internal_influence, random.
    """
    given = {"passes": passes, "tolerance": tolerance, "background": background, "forward_rows": forward_rows}
    settings = {name: value for name, value in given.items() if value is not None}
    loaded = ablate.CampaignSpec.from_file(spec).with_storage(storage_options(storage))
    estimator, subject = _estimator(loaded, str(spec), method, ablate_fraction, settings)
    target = out if out is not None else _estimate_store(spec, subject)
    with logging_to(log, log_format, tensorboard, quiet):
        outcome = workers.spread(spec, subject, target, open_estimate, (f"estimate ({method})", "example"), not quiet)
        if outcome is Outcome.SUBMITTED:
            return
        if outcome is Outcome.DONE:
            found = coar.open_attributions(subject.place(target) or target)
        else:
            found = coar.estimate(
                on_device(subject, workers.device),
                method=estimator,
                store=target,
                quality_rows=quality_rows,
                block_examples=block_examples,
                memory=int(memory_gib * 2**30),
                overwrite=overwrite,
                accept_versions=accept_versions,
                accept_code=accept_code,
                progress=not quiet,
                **workers.sharing,
            )
    ran = found.quality["passes"].astype(int)
    if as_json:
        facts = {"store": target, "method": method, "examples": len(found), "passes": float(ran.mean())}
        fraction = found.header["identity"]["of"]["plan"]["ablate_fraction"]
        mean = float(found.quality["correlation"].mean())
        print_json({**facts, "ablate_fraction": fraction, "held_out_correlation": mean})
        return
    passes_run = f"{ran.min():,}" if ran.min() == ran.max() else f"{ran.min():,} to {ran.max():,}"
    plural = "pass" if passes_run == "1" else "passes"
    quality = f"Correlation on {quality_rows} held-out keep-vectors, mean over examples: {found.quality_text()}"
    say(
        f"{len(found):,} attributions by {method} from {passes_run} {plural} per example in {target}. "
        + (quality if found.quality_measured else "Quality was not measured.")
    )


def _estimator(
    spec: ablate.CampaignSpec, where: str, method: str, ablate_fraction: float | None, settings: dict[str, Any]
) -> tuple[Estimator, ablate.CampaignSpec]:
    """Returns the estimator that spec and options ask for, and the spec with the options in it."""
    if method not in coar.estimator_names():
        advice = "Regression (ridge, ols, lasso) needs a campaign: `coar ablate`, then `coar fit`."
        raise UnknownNameError("method", method, coar.estimator_names(), advice)
    own = spec.settings
    if ablate_fraction is None:
        if not isinstance(own.ablate_fraction, float):
            several = ", ".join(f"{fraction:g}" for fraction in own.ablate_fraction)
            raise coar.FitError(
                f"{where} has several ablate fractions ({several}), an estimate is about one. Choose it with "
                "--ablate-fraction."
            )
        ablate_fraction = own.ablate_fraction
    chosen: dict[str, Any] = {"ablate_fraction": ablate_fraction}
    if "passes" in settings:
        asked = settings["passes"]
        settings = {**settings, "passes": int(asked) if asked.isdecimal() else asked}
    if method == "gradient":
        chosen["passes"] = settings.get("passes", own.passes)
        settings = {**settings, **chosen}
        if "tolerance" in settings and chosen["passes"] != "auto":
            raise coar.FitError(
                f"tolerance is given beside {chosen['passes']} passes. Give it with --passes auto only."
            )
    estimator = get_estimator(method, **settings)
    return estimator, spec.replace(**chosen)


def _estimate_store(path: Path, spec: ablate.CampaignSpec) -> str:
    """Returns where an estimate goes that was not told where."""
    if spec.settings.store is None:
        raise ablate.SpecError(str(path), ["store: missing. Name one in the spec, or pass --out."])
    return f"{spec.settings.store.rstrip('/').removesuffix('.zarr')}-estimate.zarr"
