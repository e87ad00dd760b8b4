"""Planning: what a campaign or an estimate would cost and how good it may get, from a few timed passes."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import Any

import stores
from ablate import CampaignSpec, Engine, KeepPlan, preserved_random_state
from ablate.campaign.identity import engine_identity, package_versions, sample_outputs
from coar.errors import FitError, QueryError
from coar.estimators.gradient.estimator import Gradient
from coar.estimators.plain import require_components
from coar.estimators.regression.rows import LEAST_ROWS
from coar.planning.advice import advise, round_up
from coar.planning.curve import GRADIENT, REGRESSION, needed
from coar.planning.existing import any_campaign, campaign_blocks, estimate_blocks
from coar.planning.memory import fitted_rows, with_held_out
from coar.planning.options import QUALITY_ROWS, Option, Planned
from coar.planning.report import Plan as Plan
from coar.planning.speeds import measure_speeds
from coar.planning.unablated import unablated_accuracy
from stores.storage.places import Location

SECONDS = 10.0
ROWS_PER_COMPONENT = (0.5, 1.0, 2.0, 4.0, 8.0)  # planned for where a spec has no rows
PASSES = (5, 20, 50, 100)  # and beside it
AUTO_PASSES = (10, 20, 50, 100, 200)  # where a spec says "auto"
NO_HASH = "0" * 64  # in the place of the data's, which would read them all: as long as a real one


def plan(
    spec: CampaignSpec | str | os.PathLike[str],
    *,
    store: Location | None = None,
    workers: int = 1,
    target: float | None = None,
    seconds: float = SECONDS,
) -> Plan:
    """Returns what running a spec would cost, by regression and by gradients. Writes nothing, mutates nothing.

    Loads model and data, predicts some examples, and times a few passes on a few of them. Where the spec has no rows,
    several numbers of rows are planned for. Where stores exist already, what is left of them.

    Args:
      spec: A spec or the path of a TOML file.
      store: Where the campaign is, or would be; None: the spec's `store`.
      workers: How many processes or devices would share the work, each as fast as this machine alone.
      target: A correlation to reach: also plans for the rows and passes that it took on the measured networks.
      seconds: About how long the timing may take.

    Cost: loading, checking the model, predicting for about 5 seconds, and passes for about `seconds`.

    Raises:
      SpecError: All problems of the spec at once.
      QueryError: An argument makes no sense.
      stores.StoreError: So many blocks cannot be stored, or the store that is there cannot be read.
      stores.StoreMismatchError: The store is another campaign's: running the spec would be refused, too.
      NonFiniteOutputError: An output of the timed passes is NaN or infinite.
    """
    if workers < 1:
        raise QueryError(f"workers is {workers}, expected at least 1.")
    if target is not None and not 0 < target < 1:
        raise QueryError(f"target is {target}, expected a correlation between 0 and 1 (exclusive).")
    if not (math.isfinite(seconds) and seconds > 0):
        raise QueryError(f"seconds is {seconds}, expected a number above 0.")
    if not isinstance(spec, CampaignSpec):
        spec = CampaignSpec.from_file(spec)
    place = spec.settings.store if store is None else store
    with preserved_random_state():
        return _Planner(spec, place, workers, target, seconds).plan()


class _Planner:
    """Makes one plan."""

    def __init__(
        self,
        spec: CampaignSpec,
        place: Location | None,
        workers: int,
        target: float | None,
        seconds: float,
    ) -> None:
        begun = time.perf_counter()
        self.spec, self.place, self.workers, self.target = spec, place, workers, target
        self.notes: list[str] = []
        model, self.examples = spec.load()
        index = spec.make_index(model)
        self.engine: Engine = spec.make_engine(model, index, self.examples)
        require_components(self.engine)
        self.engine.check(self.examples)
        start = time.perf_counter() - begun
        self.unablated = unablated_accuracy(model, self.examples, output_key=spec.settings.output_key)
        self.no_gradients: str | None = None
        self.estimator = self._estimator()
        settings = spec.settings
        rows = settings.rows or max(LEAST_ROWS, len(index))
        self.rows_plan = KeepPlan(len(index), rows, settings.ablate_fraction, settings.seed)
        self.blocks_done = self._existing_campaign()
        speeds = measure_speeds(self.engine, self.examples, self.rows_plan, self.estimator, start, seconds)
        self.no_gradients = self.no_gradients or speeds.no_gradients
        memory = self.engine.plan(self.examples)
        self.subject = Planned(spec, self.engine, self.examples, self._about(), memory, speeds, workers)

    def plan(self) -> Plan:
        """Returns the plan."""
        settings, subject = self.spec.settings, self.subject
        options = [*self._regressions(), *self._gradients()]
        needs = {} if self.target is None else {way: needed(way, self.target) for way in (REGRESSION, GRADIENT)}
        if self.no_gradients is not None:
            needs.pop(GRADIENT, None)
            self.notes.append(f"No gradient estimate: {self.no_gradients}")
        self._say_limits(options)
        return Plan(
            components=subject.components,
            examples=len(self.examples),
            block_rows=settings.block_rows,
            ablate_fraction=settings.ablate_fraction,
            workers=self.workers,
            speeds=subject.speeds,
            options=tuple(options),
            needs=needs,
            recommendation=advise(options, self.target),
            notes=tuple(self.notes),
            unablated=self.unablated,
        )

    def _about(self) -> dict[str, Any]:
        """Returns as much as a store's header says of what it is bound to, with hashes left out: as long as that."""
        return {
            **self.engine.identity(self.examples).describe(),
            "sample_outputs": sample_outputs(self.engine, self.examples),
            "data": NO_HASH,
            **engine_identity(self.engine),
            "plan": self.rows_plan.describe(),
            "versions": package_versions(),
        }

    def _estimator(self) -> Gradient | None:
        fractions = self.spec.settings.ablate_fraction
        first = fractions if isinstance(fractions, float) else fractions[0]
        if first is not fractions:
            self.notes.append(
                f"An estimate is about one ablate fraction: gradients are planned for {first:g} alone, the first."
            )
        try:
            return Gradient(ablate_fraction=float(first))
        except FitError as error:
            self.no_gradients = str(error)
            return None

    def _existing_campaign(self) -> int:
        """Returns how many blocks are finished of the campaign, if it exists."""
        settings = self.spec.settings
        done = 0
        notes: list[str] = []
        place = None if self.place is None else self.spec.place(self.place)
        if place is not None and settings.rows is not None:
            own = self.examples, self.rows_plan, self.engine, settings.block_rows
            done, notes = campaign_blocks(place, *own)
        elif place is not None:
            notes = any_campaign(place)
        self.notes += notes
        return done

    def _regressions(self) -> list[Option]:
        rows, components = self.spec.settings.rows, self.subject.components
        if rows is not None:
            numbers = {rows: "spec"}
        else:
            self.notes.append("The spec has no rows: several numbers of rows are planned for. A campaign needs one.")
            numbers = {round_up(max(LEAST_ROWS, factor * components)): "choice" for factor in ROWS_PER_COMPONENT}
        wanted = None if self.target is None else needed(REGRESSION, self.target).budgets
        if wanted:
            numbers[round_up(max(LEAST_ROWS, max(wanted.values()) * with_held_out(components)))] = "target"
        options = []
        for number, purpose in sorted(numbers.items()):
            try:
                done = self.blocks_done if number == rows else 0
                options.append(self.subject.regression(number, purpose, done))
            except stores.StoreError as error:
                if purpose == "spec" or not options:
                    raise
                self.notes.append(f"{number:,} rows cannot be stored: {error}")
        return options

    def _gradients(self) -> list[Option]:
        if self.estimator is None or self.no_gradients is not None:
            return []
        settings = self.spec.settings
        asked = settings.passes
        numbers: dict[int, str] = {}
        if asked == "auto":
            self.notes.append("passes = 'auto' goes on until its own error is small: how many that are is not known.")
            numbers = dict.fromkeys(AUTO_PASSES, "choice")
        elif settings.rows is None:
            numbers = dict.fromkeys(PASSES, "choice")
        if asked != "auto":
            numbers[asked] = "spec"
        wanted = None if self.target is None else needed(GRADIENT, self.target).budgets
        if wanted:
            numbers[max(2, math.ceil(max(wanted.values()) - 1e-9))] = "target"
        try:
            return [self._gradient(self.estimator, n, numbers[n]) for n in sorted(numbers)]
        except FitError as error:
            self.no_gradients = str(error)
            return []

    def _gradient(self, estimator: Gradient, passes: int, purpose: str) -> Option:
        done, seed = 0, self.spec.settings.seed
        if self.place is not None and passes == self.spec.settings.passes:
            own = replace(estimator, passes=passes)
            subject = self.examples, self.engine
            done, notes = estimate_blocks(self.place, self.spec, *subject, own, QUALITY_ROWS, seed)
            self.notes += notes
        return self.subject.gradient(estimator, passes, purpose, done)

    def _say_limits(self, options: list[Option]) -> None:
        for option in options:
            if option.purpose != "choice" and self.workers > option.blocks_left > 0:
                left = "1 block is" if option.blocks_left == 1 else f"{option.blocks_left} blocks are"
                self.notes.append(
                    f"{option.name}: {left} left, so that {self.workers - option.blocks_left} of {self.workers} "
                    "workers find nothing to do."
                )
        rows, components = self.spec.settings.rows, self.subject.components
        if rows is not None and rows < LEAST_ROWS:
            self.notes.append(f"The spec has {rows} rows, and a fit needs at least {LEAST_ROWS}.")
        elif rows is not None and fitted_rows(rows) < components:
            self.notes.append(
                f"Of the spec's rows {fitted_rows(rows):,} are fitted, fewer than there are components "
                f"({components:,}): a regression of so few is poor."
            )
        if any(option.quality.above for option in options):
            self.notes.append(
                "Where a budget is above the largest that was measured, the largest one's figure is given."
            )
