"""Estimating attributions from a model, block of examples by block of examples, into a store that is gone on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from zarr.storage import MemoryStore

from ablate import CampaignSpec, Engine, Examples, KeepPlan, NonFiniteOutputError, preserved_random_state
from ablate.campaign.identity import package_versions, subject_identity
from ablate.work.loop import Job, Sharing, Values, environment, work_through
from coar.attributions.attributions import Attributions
from coar.errors import FitError
from coar.estimators.abstract import Estimator
from coar.estimators.differentiable import check_differentiable
from coar.estimators.plain import require_components
from coar.estimators.registry import get_estimator
from coar.estimators.storing import open_same, remove
from coar.statistics import correlation, explained_share
from stores import AttributionStore, StoreExistsError
from stores.format.groups import Location
from stores.records import LEASE_SECONDS

QUALITY = ("correlation", "r2", "residual_sd", "passes")
QUALITY_SEED = 0x9A11  # held-out rows are never those of a campaign or an evaluation with the same seed
ABLATE_FRACTION = 0.05
BLOCK_EXAMPLES = 256


def estimate(
    model: nn.Module | CampaignSpec | str | os.PathLike[str],
    data: Any = None,
    *,
    index: Any = None,
    method: str | Estimator = "gradient",
    passes: int | str | None = None,
    ablate_fraction: float | None = None,
    output: Any = None,
    seed: int | None = None,
    store: Location | None = None,
    quality_rows: int = 50,
    block_examples: int = BLOCK_EXAMPLES,
    memory: int = 2 * 2**30,
    overwrite: bool = False,
    progress: bool = False,
    accept_versions: bool = False,
    accept_code: bool = False,
    worker: str | None = None,
    lease_seconds: float = LEASE_SECONDS,
    keep_going: bool = False,
    retry_failed: bool | None = None,
    **options: Any,
) -> Attributions:
    """Returns one linear attribution per example, estimated by running the model. The model is not changed.

    Goes block of examples by block of examples; a block is final when it is written. Running the same again goes on
    where it stopped, and stores the same bytes as a run that never stopped (same machine and thread count). Run by
    several processes at once, on one machine or many, they share the work.

    Args:
      model: An `nn.Module`, or a CampaignSpec or the path of one: then data, index, output, seed, ablate fraction,
        passes and options are the spec's.
      data: `(inputs, targets)`, a `Dataset`, or `Examples`.
      index: The components; None: the sensible default for this model.
      method: A name (`coar.estimators.registry.estimator_names()`) or an instance, e.g. `Gradient(background="mixed")`.
      passes: Of the gradient estimator: an integer from 2 on, or "auto"; None: 100.
      ablate_fraction: What share is off in the keep-vectors that the attribution is about; None: 0.05.
      output: As for `Engine`; None: `margin`, or the spec's.
      seed: Of everything that is sampled; None: 0, or the spec's.
      store: Where to write; None: in memory. A finished store of the same estimate is returned as it is.
      quality_rows: Random keep-vectors run forward beside the estimate, to measure held-out correlation per example;
        they cost so many plain forwards. 0: quality is NaN.
      block_examples: Most examples of a block. Estimates are pooled over the examples of a block, so that another size
        changes them a little. A larger one is better, up to some hundred.
      memory: Budget in bytes for everything but the engine: blocks are made as small as it needs.
      overwrite: Replace another estimate at `store`.
      progress: Show a progress bar on stderr.
      accept_versions, accept_code, worker, lease_seconds, keep_going, retry_failed: As for `ablate.run`.
      options: `components`, `device`, `precision`, `batch_size`, `ablation`, `memory_budget`, `speed`, ...: as for
        CampaignSpec.

    Returns:
      Weights and standard errors (examples, components), bias (examples,), in units of the output.

    Raises:
      FitError: Settings that make no sense, no gradients (offers regression), a budget too small.
      ablate.SpecError: All other problems of the arguments at once.
      ablate.NonFiniteOutputError: NaN gradients; names the example and component. Finished blocks stay.
      stores.StoreMismatchError: There is another estimate at `store`.
      stores.FailedBlocksError: With `keep_going`: blocks failed and were set aside; all others are finished.
    """
    sharing = Sharing.of(worker, lease_seconds, keep_going, retry_failed)
    if isinstance(model, nn.Module):
        fraction = _fraction(method, ablate_fraction)
        given = {"index": index, "output": output, "seed": seed, "ablate_fraction": fraction, **options}
        spec = CampaignSpec(model=model, data=data, **{k: v for k, v in given.items() if v is not None})
    else:
        spec = model if isinstance(model, CampaignSpec) else CampaignSpec.from_file(model)
        _only_in_spec(spec, data, index, options, output, seed)
        passes = spec.settings.passes if passes is None and method == "gradient" else passes
        fraction = _fraction(method, ablate_fraction, spec.settings.ablate_fraction)
    if quality_rows and quality_rows < 10:
        raise FitError(f"quality_rows is {quality_rows}, expected 0 (none) or at least 10.")
    if block_examples < 1:
        raise FitError(f"block_examples is {block_examples}, expected at least 1.")
    settings: dict[str, Any] = {} if passes is None else {"passes": passes}
    if method == "gradient":
        settings["ablate_fraction"] = fraction
    estimator = get_estimator(method, **settings)
    place = MemoryStore() if store is None else spec.place(store) or store
    with preserved_random_state():
        run = _Run(spec, estimator, fraction, quality_rows)
        accepted = {"accept_versions": accept_versions, "accept_code": accept_code}
        target = open_same(place, run.identity, overwrite, **accepted)
        if target is None or target.missing_blocks():
            block = _block_size(run, block_examples, memory, store is None, target)
            if target is None:
                run.check()  # a model that cannot be run, or has no gradients, leaves no store behind
                if overwrite:
                    remove(place)
                try:
                    target = run.create(place, block)
                except StoreExistsError:  # another worker, started at the same moment, was first
                    target = open_same(place, run.identity, False, **accepted)
                    if target is None:
                        raise
            work_through(target, _job(run, target), environment(run.engine, package_versions()), sharing, progress)
    return Attributions(AttributionStore.open(place))


class _Run:
    """Everything an estimate is made of."""

    def __init__(self, spec: CampaignSpec, estimator: Estimator, fraction: float, quality_rows: int) -> None:
        self.spec, self.estimator, self.quality_rows, self.fraction = spec, estimator, quality_rows, fraction
        self.model, self.examples = spec.load()
        self.index = spec.make_index(self.model)
        self.engine: Engine = spec.make_engine(self.model, self.index, self.examples)
        require_components(self.engine)
        self.seed = spec.settings.seed
        self.plan = KeepPlan(len(self.index), max(1, quality_rows), fraction, self.seed ^ QUALITY_SEED)

    def identity(self) -> dict[str, Any]:
        """Returns what the store is bound to."""
        of = subject_identity(self.examples, self.engine)
        of["plan"] = {"ablate_fraction": self.fraction, "seed": self.seed}
        return {
            **self.estimator.describe(),
            "quality_rows": self.quality_rows,
            "of": of,
            "versions": package_versions(),
        }

    def check(self) -> None:
        """Raises what the engine or the method has against this model and these examples, as far as few can tell."""
        self.engine.check(self.examples)
        if self.estimator.needs_gradients:
            check_differentiable(self.engine, self.examples)

    def create(self, place: Location, block: int) -> AttributionStore:
        """Makes the empty store."""
        header: Mapping[str, Any] = {
            "identity": self.identity(),
            "spec": self.spec.describe(),
            "loadable": self.spec.loadable,
            "index": self.index.to_json(),
        }
        return AttributionStore.create(
            place,
            header=header,
            components=self.index.columns,
            examples=self.examples.columns(),
            block_examples=block,
            quality=QUALITY,
        )

    def block(self, span: slice) -> dict[str, npt.NDArray[np.float32]]:
        """Returns the arrays of a block of examples."""
        examples = self.examples.take(range(span.start, span.stop))
        found = self.estimator.estimate(self.engine, examples, span.start, self.seed)
        values = {"weights": found.weights, "stderr": found.stderr, "bias": found.bias, "quality/passes": found.passes}
        return {**values, **self._quality(examples, found.weights, found.bias)}

    def _quality(self, examples: Examples, weights: Any, bias: Any) -> dict[str, npt.NDArray[np.float32]]:
        if not self.quality_rows:
            unknown = np.full(len(examples), np.nan, dtype=np.float32)
            return {f"quality/{name}": unknown for name in ("correlation", "r2", "residual_sd")}
        keep = self.plan.take(0, self.quality_rows)
        observed = self.engine.outputs(keep, examples).numpy().astype(np.float64)
        predicted = keep.astype(np.float64) @ weights.T.astype(np.float64) + bias
        found = {
            "correlation": correlation(predicted, observed),
            "r2": explained_share(predicted, observed),
            "residual_sd": np.sqrt(((observed - predicted) ** 2).mean(axis=0)),
        }
        return {f"quality/{name}": value.astype(np.float32) for name, value in found.items()}


def _job(run: _Run, target: AttributionStore) -> Job:
    def compute(block: int) -> Values:
        span = target.span(block)
        try:
            return run.block(span)
        except NonFiniteOutputError as error:
            raise _among_all(error, span.start, run.examples) from error

    def examples(block: int) -> str:
        span = target.span(block)
        return f"examples {span.start} to {span.stop - 1}"

    work = run.estimator.work(len(run.index))
    return Job(
        f"estimate ({run.estimator.name})",
        "example",
        compute,
        target.write_block,
        examples,
        work=None if work is None else work + run.quality_rows,
        measured=_held_out,
    )


def _held_out(values: Values) -> dict[str, float]:
    """Returns the mean held-out correlation of a block, if it was measured."""
    found = values["quality/correlation"]
    return {"correlation": float(np.nanmean(found))} if np.isfinite(found).any() else {}


def _among_all(error: NonFiniteOutputError, first: int, examples: Examples) -> NonFiniteOutputError:
    """Returns an error that counts examples from a block's first as one that counts from the first of all."""
    example = first + error.example
    return NonFiniteOutputError(error.row, example, error.value, examples.ids[example], error.component)


def _block_size(run: _Run, most: int, memory: int, keep_result: bool, target: AttributionStore | None) -> int:
    """Returns how many examples a block has: at most so many, and so that the budget is kept."""
    components, total = len(run.index), len(run.examples)
    fixed = run.estimator.fixed_memory(components) + 9 * components * run.quality_rows
    if keep_result:
        fixed += 2 * 4 * components * total
    each = run.estimator.memory(components) + 24 * run.quality_rows + run.examples.bytes_per_example
    fits = (memory - fixed) // each if memory > fixed else 0
    wanted = min(most, total) if target is None else target.block_examples
    if fits < (1 if target is None else wanted):
        need = fixed + (1 if target is None else wanted) * each
        raise FitError(
            f"memory={memory:,} bytes is too small for {components:,} components: at least {need:,} are needed, "
            f"{fixed + min(total, 64) * each:,} or more are comfortable."
            + (" Pass store=PATH so that the result need not be kept in memory." if keep_result else "")
        )
    return int(min(wanted, fits))


def _fraction(method: str | Estimator, given: Any, of_spec: Any = None) -> float:
    """Returns the one ablate fraction: the method's own, the one given, the spec's, or the default."""
    own = getattr(method, "ablate_fraction", None) if isinstance(method, Estimator) else None
    if own is not None and given not in (None, own):
        raise FitError(f"ablate_fraction is {given}, but the method has its own, {own}. Give it once.")
    if own is not None and isinstance(of_spec, float) and of_spec != own:
        raise FitError(f"ablate_fraction is {of_spec} in the spec, but the method has its own, {own}. Give it once.")
    chosen = next((value for value in (own, given, of_spec) if value is not None), ABLATE_FRACTION)
    if not isinstance(chosen, (int, float)):
        raise FitError(f"An estimate is about one ablate fraction, got {chosen!r}. Choose one: ablate_fraction=.")
    return float(chosen)


def _only_in_spec(
    spec: CampaignSpec, data: Any, index: Any, options: Mapping[str, Any], output: Any, seed: int | None
) -> None:
    """Raises FitError for an argument beside a spec that has it, too, and says otherwise."""
    given = {
        "data": data is not None,
        "index": index is not None,
        "output": output is not None and output != spec.output,
        "seed": seed is not None and seed != spec.settings.seed,
    }
    names = [name for name, is_given in given.items() if is_given] + list(options)
    if names:
        raise FitError(f"{', '.join(names)}: given beside a spec, which has its own. Change the spec.")
