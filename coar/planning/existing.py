"""What is there already: finished blocks of the campaign and of the estimate that a plan is about."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import stores
from ablate import CampaignSpec, Engine, Examples, KeepPlan
from ablate.campaign.identity import campaign_identity, package_versions, require_same, subject_identity
from coar.estimators.gradient.estimator import Gradient
from coar.estimators.storing import open_same
from stores.storage.places import Location


def campaign_blocks(
    place: Location, examples: Examples, plan: KeepPlan, engine: Engine, block_rows: int
) -> tuple[int, list[str]]:
    """Returns how many blocks of this campaign are finished at a place, and what to say about it. Mutates nothing.

    Raises:
      stores.StoreMismatchError: There is another campaign, as running this one would raise.
    """
    try:
        campaign = stores.CampaignStore.open(place)
    except stores.StoreNotFoundError:
        return 0, []
    stored, where = campaign.header.get("identity", {}), f"Campaign {campaign.where}"
    identity = partial(campaign_identity, examples, plan, engine, block_rows)
    done = campaign.progress
    advice = "Give the original back, or name another store for the new campaign."
    require_same(where, stored, identity, lambda: advice, finished=done.complete, accept_versions=True)
    versions = stores.differences({"versions": stored["versions"]}, {"versions": package_versions()})
    left = "nothing is left but the fit" if done.complete else "times are of what is left"
    notes = [f"{campaign.where} exists: {done.finished_rows:,} of {done.rows:,} rows are finished; {left}."]
    if versions and not done.complete:
        changes = "; ".join(map(str, versions))
        notes.append(f"It was written by other versions ({changes}): going on needs --accept-versions.")
    return done.finished_blocks, notes


def any_campaign(place: Location) -> list[str]:
    """Returns what to say about a campaign at a place, if there is one, where the spec has no rows."""
    try:
        campaign = stores.CampaignStore.open(place)
    except stores.StoreNotFoundError:
        return []
    done = campaign.progress
    return [
        f"{campaign.where} exists: {done.finished_rows:,} of {done.rows:,} rows are finished. The spec has no rows, so "
        "whether it is the same campaign was not compared."
    ]


def estimate_blocks(
    campaign: Location,
    spec: CampaignSpec,
    examples: Examples,
    engine: Engine,
    estimator: Gradient,
    quality_rows: int,
    seed: int,
) -> tuple[int, list[str]]:
    """Returns how many blocks of this estimate are finished where `coar estimate` writes it, and what to say about it.

    Args:
      campaign: The spec's store, from whose name the estimate's follows; a store object has no name.
      spec: Whose options of object storage are used.
      examples, engine, estimator, quality_rows, seed: What the estimate is bound to.
    """
    if not isinstance(campaign, (str, os.PathLike)):
        return 0, []
    path = f"{os.fspath(campaign).rstrip('/').removesuffix('.zarr')}-estimate.zarr"

    def identity() -> dict[str, Any]:
        plan = {"ablate_fraction": estimator.ablate_fraction, "seed": seed}
        of = {**subject_identity(examples, engine), "plan": plan}
        own = {**estimator.describe(), "quality_rows": quality_rows}
        return {**own, "of": of, "versions": package_versions()}

    try:
        found = open_same(spec.place(path) or path, identity, overwrite=False, accept_versions=True)
    except stores.StoreMismatchError as error:
        keys = ", ".join(difference.key for difference in error.differences)
        return 0, [f"{path} is another estimate (it differs in {keys}): name another place for this one with --out."]
    if found is None:
        return 0, []
    blocks = len(found.blocks)
    done = blocks - len(found.missing_blocks())
    return done, [f"{path} exists: {done} of {blocks} blocks of examples are estimated; times are of what is left."]
