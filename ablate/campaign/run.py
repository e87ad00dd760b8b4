"""Running a campaign block by block into a store, and going on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import numpy as np

from ablate.campaign.identity import Identity, campaign_identity, package_versions, require_same
from ablate.campaign.spec import CampaignSpec
from ablate.data.changed import what_changed
from ablate.data.examples import Examples
from ablate.engine.engine import Engine
from ablate.errors import NonFiniteOutputError, SpecError
from ablate.keep import KeepPlan
from ablate.state import preserved_random_state
from ablate.work.loop import Job, Sharing, Values, environment, work_through
from stores import CampaignStore, StoreExistsError, StoreNotFoundError
from stores.format.groups import Location
from stores.maintenance.compact import make_copies
from stores.records import LEASE_SECONDS

ADVICE = "Give the original back, or name another store for the new campaign."


def run(
    spec: CampaignSpec | str | os.PathLike[str],
    store: Location | None = None,
    *,
    progress: bool = True,
    accept_versions: bool = False,
    accept_code: bool = False,
    worker: str | None = None,
    lease_seconds: float = LEASE_SECONDS,
    keep_going: bool = False,
    retry_failed: bool | None = None,
) -> CampaignStore:
    """Runs a campaign into its store, block by block, and returns the store; a finished one is returned as it is.

    Running the same spec again goes on where it stopped, and stores the same bytes as a run that never stopped (same
    machine and thread count). Run by several processes at once, on one machine or many, they share the work. Changes
    nothing but the store: not the model, not the global random state.

    Args:
      spec: A spec or the path of a TOML file.
      store: A path or zarr store object; None: the spec's `store`.
      progress: Show rows per second and time left on stderr.
      accept_versions: Go on with a store written by other versions of the packages: equal up to rounding.
      accept_code: Go on with a store whose network was written in another way, if it computes the same: outputs of two
        examples are compared.
      worker: "i/N": this is worker i (from 0) of N; only says at which block it begins. Any number may work at once.
      lease_seconds: After how long without a sign of life another worker's block is taken over.
      keep_going: Set blocks aside that failed three times, and go on with the others, instead of raising at the first.
      retry_failed: Try blocks anew that were set aside by an earlier run; None: yes, but of several workers only 0.

    Returns:
      The store, complete, open for reading only.

    Cost: rows x examples forwards.

    Raises:
      SpecError: The spec has problems, or no store is named.
      stores.StoreMismatchError: The store was made from another model, data set, index, plan or version.
      NonFiniteOutputError: An output is NaN or infinite; names keep row and example. Finished blocks stay.
      stores.FailedBlocksError: With `keep_going`: blocks failed and were set aside; all others are finished.
    """
    sharing = Sharing.of(worker, lease_seconds, keep_going, retry_failed)
    if not isinstance(spec, CampaignSpec):
        spec = CampaignSpec.from_file(spec)
    place = spec.place(store)
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
        identity = partial(campaign_identity, examples, plan, engine, settings.block_rows)
        accepted = {"accept_versions": accept_versions, "accept_code": accept_code}
        campaign = _open_or_create(place, spec, engine, identity, examples, plan, accepted)
        if campaign.missing_blocks():
            job = _job(campaign, engine, plan, examples)
            work_through(campaign, job, environment(engine, package_versions()), sharing, progress)
    if settings.compact and worker is None:  # one of several would disturb the others' copies
        make_copies(place)
    return CampaignStore.open(place)


def _open_or_create(
    place: Location,
    spec: CampaignSpec,
    engine: Engine,
    identity: Identity,
    examples: Examples,
    plan: KeepPlan,
    accepted: Mapping[str, bool],
) -> CampaignStore:
    try:
        campaign = CampaignStore.open(place, mode="r+")
    except StoreNotFoundError:
        header = {
            "identity": identity(),  # a model that cannot be run leaves no store behind
            "spec": spec.describe(),
            "loadable": spec.loadable,
            "index": engine.index.to_json(),
        }
        try:
            return CampaignStore.create(
                place,
                header=header,
                components=engine.index.columns,
                examples=examples.columns(),
                rows=plan.rows,
                block_rows=spec.settings.block_rows,
            )
        except StoreExistsError:  # another worker, started at the same moment, was first
            campaign = CampaignStore.open(place, mode="r+")
    require_same(
        f"Campaign {campaign.where}",
        campaign.header.get("identity", {}),
        identity,
        lambda: f"{what_changed(campaign.examples, examples)} {ADVICE}".lstrip(),
        finished=not campaign.missing_blocks(),
        **accepted,
    )
    return campaign


def _job(campaign: CampaignStore, engine: Engine, plan: KeepPlan, examples: Examples) -> Job:
    def compute(block: int) -> Values:
        span = campaign.span(block)
        keep = plan.take(span.start, span.stop)
        try:
            outputs = engine.outputs(keep, examples)
        except NonFiniteOutputError as error:
            raise NonFiniteOutputError(
                span.start + error.row, error.example, error.value, examples.ids[error.example]
            ) from None
        return {"keep": keep, "outputs": outputs.numpy().astype(np.float32, copy=False)}

    def write(block: int, values: Values) -> bool:
        return campaign.write_block(block, values["keep"], values["outputs"])

    def rows(block: int) -> str:
        span = campaign.span(block)
        return f"keep rows {span.start} to {span.stop - 1}"

    return Job(f"ablate {len(examples)} examples", "row", compute, write, rows, work=len(examples))
