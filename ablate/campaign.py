"""Running a campaign block by block into a store, and going on where it stopped."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import stores
from ablate.data import Examples
from ablate.engine import Engine
from ablate.errors import NonFiniteOutputError, SpecError
from ablate.keep import KeepPlan
from ablate.progress import progress_bar
from ablate.spec import CampaignSpec
from ablate.state import model_hash, preserved_random_state
from stores import CampaignStore, StoreMismatchError, StoreNotFoundError
from stores.schema import Location

PACKAGES = ("component-attribution", "torch", "numpy", "zarr")


def run(
    spec: CampaignSpec | str | os.PathLike[str],
    store: Location | None = None,
    *,
    progress: bool = True,
    accept_versions: bool = False,
) -> CampaignStore:
    """Runs a campaign into its store, block by block, and returns the store; a finished one is returned as it is.

    Running the same spec again goes on where it stopped, and stores the same bytes as a run that never stopped (same
    machine and thread count). Changes nothing but the store: not the model, not the global random state.

    Args:
      spec: A spec or the path of a TOML file.
      store: A path or zarr store object; None: the spec's `store`.
      progress: Show rows per second and time left on stderr.
      accept_versions: Go on with a store written by other versions of the packages: equal up to rounding.

    Returns:
      The store, complete.

    Cost: rows x examples forwards.

    Raises:
      SpecError: The spec has problems, or no store is named.
      stores.StoreMismatchError: The store was made from another model, data set, index, plan or version.
      NonFiniteOutputError: An output is NaN or infinite; names keep row and example. Finished blocks stay.
    """
    if not isinstance(spec, CampaignSpec):
        spec = CampaignSpec.from_file(spec)
    place = store if store is not None else spec.settings.store
    if place is None:
        raise SpecError("CampaignSpec", ["store: missing. Name one in the spec, or pass store=."])
    if spec.settings.rows is None:
        raise SpecError("CampaignSpec", ["rows: missing. Give the number of keep-vectors to run."])
    with preserved_random_state():
        model, examples = spec.load()
        index = spec.make_index(model)
        settings = spec.settings
        plan = KeepPlan(len(index), spec.settings.rows, settings.ablate_fraction, settings.seed)
        engine = spec.make_engine(model, index, examples)
        identity = campaign_identity(model_hash(model), examples, plan, engine, settings.block_rows)
        campaign = _open_or_create(place, spec, engine, identity, examples, plan, accept_versions)
        _compute_missing(campaign, engine, plan, examples, progress)
    return campaign


def campaign_identity(
    model: str, examples: Examples, plan: KeepPlan, engine: Engine, block_rows: int
) -> dict[str, Any]:
    """Returns what a store is bound to: a store resumed with a value that differs is refused, naming each."""
    return {
        **subject_identity(model, examples, engine),
        "plan": plan.describe(),
        "block_rows": min(block_rows, plan.rows),
        "versions": package_versions(),
    }


def subject_identity(model: str, examples: Examples, engine: Engine) -> dict[str, Any]:
    """Returns what is ablated and measured, of a model with this hash: what campaigns and estimates have in common."""
    output = type(engine.output)
    return {
        "model": model,
        "data": examples.hash,
        "index": engine.index.hash,
        "output": f"{engine.output.name} ({output.__module__}.{output.__qualname__})",
        "ablation": engine.ablation.describe(),
        "precision": engine.precision,
    }


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that decide how numbers are rounded."""
    return {package: version(package) for package in PACKAGES}


def _open_or_create(
    place: Location,
    spec: CampaignSpec,
    engine: Engine,
    identity: Mapping[str, Any],
    examples: Examples,
    plan: KeepPlan,
    accept_versions: bool,
) -> CampaignStore:
    try:
        campaign = CampaignStore.open(place, mode="r+")
    except StoreNotFoundError:
        engine.check(examples)  # a model that cannot be run leaves no store behind
        header = {
            "identity": dict(identity),
            "spec": spec.describe(),
            "loadable": spec.loadable,
            "index": engine.index.to_json(),
            "environments": [_environment(engine, identity)],
        }
        return CampaignStore.create(
            place,
            header=header,
            components=engine.index.columns,
            examples=examples.columns(),
            rows=plan.rows,
            block_rows=spec.settings.block_rows,
        )
    found = stores.differences(campaign.header.get("identity", {}), identity)
    if accept_versions or not campaign.missing_blocks():  # nothing is left to round differently
        found = [difference for difference in found if not difference.key.startswith("versions.")]
    if found:
        advice = "Give the original back, or name another store for the new campaign."
        if all(difference.key.startswith("versions.") for difference in found):
            advice = (
                "Other versions may round differently. Install the stored ones, or go on all the same with "
                "accept_versions=True (`coar ablate --accept-versions`)."
            )
        raise StoreMismatchError(f"Campaign {campaign.where}", found, advice)
    if campaign.missing_blocks():
        engine.check(examples)
        campaign.add_environment(_environment(engine, identity))
    return campaign


def _environment(engine: Engine, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what changes rounding only, and is recorded, not compared."""
    return {
        "versions": identity["versions"],
        "python": platform.python_version(),
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "batch_size": engine.batch_size,
        "speed": asdict(engine.speed),
    }


def _compute_missing(
    campaign: CampaignStore, engine: Engine, plan: KeepPlan, examples: Examples, progress: bool
) -> None:
    state = campaign.progress
    what = f"ablate {len(examples)} examples"
    with progress_bar(what, state.rows, state.finished_rows, "row", progress) as bar:
        for block in campaign.missing_blocks():
            span = campaign.span(block)
            keep = plan.take(span.start, span.stop)
            try:
                outputs = engine.outputs(keep, examples)
            except NonFiniteOutputError as error:
                raise NonFiniteOutputError(
                    span.start + error.row, error.example, error.value, examples.ids[error.example]
                ) from None
            except Exception as error:
                error.add_note(
                    f"This happened in block {block} (keep rows {span.start} to {span.stop - 1}) of {campaign.where}. "
                    "Finished blocks stay: run the same command again to go on from here."
                )
                raise
            campaign.write_block(block, keep, outputs.numpy().astype(np.float32, copy=False))
            bar.update(len(keep))
