"""Which ablate fraction: the largest at which the network still works, and a line can still explain it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from ablate import CampaignSpec, Engine, KeepPlan, Margin, preserved_random_state
from ablate.outputs import CrossEntropyLoss, Logit, LogProbability, Output, TokenMeanMargin
from coar.errors import QueryError
from coar.estimators.plain import require_components
from coar.planning.halves import FractionMeasure, HalvesMeter
from coar.report import plots

FRACTIONS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
START = 0.003
LEAST_HALVES = 0.9  # what a line must be able to explain
LEAST_KEPT = 2 / 3  # of the predictions that are right at first
LEAST_RIGHT = 0.25  # of the examples: with fewer right at first, predictions do not say whether a network works
ROWS, MOST_ROWS = 8, 30
MOST_EXAMPLES = 100
SURE = 2.0  # standard errors from a limit


@dataclass(frozen=True)
class FractionChoice:
    """The recommended ablate fraction, and what was measured at each.

    Attributes:
      ablate_fraction: The recommended one.
      reason: Why, in words, with the numbers.
      measures: What was measured, by rising fraction.
      right: Share of the examples that the whole network predicts right; NaN: its output does not say.
      components, examples: How many the network has, and how many were run.
      forwards: What it cost: runs of all these examples.
      seed: Of the keep-vectors.
    """

    ablate_fraction: float
    reason: str
    measures: tuple[FractionMeasure, ...]
    right: float
    components: int
    examples: int
    forwards: int
    seed: int

    def __repr__(self) -> str:
        return f"<FractionChoice: {self.reason}>"

    def table(self) -> pd.DataFrame:
        """Returns one row per fraction.

        Returns:
          ablate_fraction; right_kept (share of the right predictions that stay right, NaN: not judged); mean_drop and
          sd (of the output, in its units); halves (the correlation a line can reach at most) and its standard error;
          rows (random keep-vectors); recommended.
        """
        rows = [
            {
                "ablate_fraction": m.ablate_fraction,
                "right_kept": m.right_kept,
                "mean_drop": m.mean_drop,
                "sd": m.sd,
                "halves": m.halves,
                "halves_error": m.halves_error,
                "rows": m.rows,
                "recommended": m.ablate_fraction == self.ablate_fraction,
            }
            for m in self.measures
        ]
        return pd.DataFrame(rows)

    def at(self, ablate_fraction: float) -> FractionMeasure:
        """Returns what was measured at a fraction. Raises QueryError for one that was not tried."""
        for found in self.measures:
            if found.ablate_fraction == ablate_fraction:
                return found
        tried = ", ".join(f"{m.ablate_fraction:g}" for m in self.measures)
        raise QueryError(f"Nothing was measured at ablate fraction {ablate_fraction:g}, only at {tried}.")

    def figure(self) -> Figure:
        """Returns the figure of the table: what is kept, and what a line can explain, against the fraction."""
        return plots.ablate_fractions(self.table(), LEAST_KEPT, LEAST_HALVES)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-able values; NaN where something was not judged."""
        table = self.table().to_dict("records")
        names = ("ablate_fraction", "reason", "right", "components", "examples", "forwards", "seed")
        return {**{name: getattr(self, name) for name in names}, "fractions": table}


def choose_fraction(
    model: nn.Module | CampaignSpec | str | os.PathLike[str],
    examples: Any = None,
    *,
    index: Any = None,
    output: Any = "margin",
    ablation: Any = "zero",
    fractions: Sequence[float] = FRACTIONS,
    most_examples: int = MOST_EXAMPLES,
    seed: int = 0,
    **options: Any,
) -> FractionChoice:
    """Returns which share of components to ablate, measured on this network. The model is not changed.

    At each fraction random keep-vectors are run: how many right predictions stay right, and whether what two halves of
    an ablated set do together is what they do one by one (c: what any linear attribution can reach at most).
    Recommended is, going from 0.003 up or down, the largest with c of at least 0.9 and two thirds of the right
    predictions kept; where fewer than a quarter of the examples are right at first, c alone counts. Fractions that
    ablate less than one component on average are measured and not recommended.

    Args:
      model: An `nn.Module`, or a CampaignSpec or the path of one: then all but the fractions is the spec's.
      examples: `(inputs, targets)`, a `Dataset`, or `Examples`.
      index: The components; None: the sensible default for this model.
      output: As for `Engine`.
      ablation: As for CampaignSpec: with "mean", means are taken over these examples.
      fractions: Those tried.
      most_examples: Of more examples, so many are run, evenly spaced.
      seed: Of the keep-vectors, which are not those of campaigns of that seed.
      options: `components`, `device`, `precision`, `batch_size`, `memory_budget`, `speed`, ...: as for CampaignSpec.

    Cost: about 200 forwards of the examples for six fractions: 8 keep-vectors each, and up to 30 where that does not
    decide; three forwards a keep-vector, four where the output is no margin.

    Raises:
      QueryError: No fraction, or one given twice; fewer than 1 example.
      ablate.KeepError: A fraction that is not between 0 and 1.
      ablate.SpecError: All other problems of the arguments at once.
    """
    tried = _checked(fractions)
    if most_examples < 1:
        raise QueryError(f"most_examples is {most_examples}, expected at least 1.")
    spec = _spec(model, examples, {"index": index, "output": output, "ablation": ablation, "seed": seed, **options})
    with preserved_random_state():
        loaded, data = spec.load()
        engine = spec.make_engine(loaded, spec.make_index(loaded), data)
        require_components(engine)
        some = data.take(np.linspace(0, len(data) - 1, min(len(data), most_examples)).round().astype(np.int64))
        margins, judge = _margins(engine, spec, loaded)
        meter = HalvesMeter(engine, margins, some, judge, spec.settings.seed)
        return _FractionSearch(meter, tried, len(engine.index), len(some), spec.settings.seed).choose()


def _checked(fractions: Sequence[float]) -> list[float]:
    tried = sorted(float(fraction) for fraction in fractions)
    if not tried or len(set(tried)) < len(tried):
        raise QueryError(f"fractions are {tried}, expected one or more numbers that differ.")
    for fraction in tried:
        KeepPlan(1, 1, fraction)  # refuses what is not between 0 and 1, before anything runs
    return tried


def _spec(model: Any, examples: Any, values: dict[str, Any]) -> CampaignSpec:
    if isinstance(model, nn.Module):
        given = {name: value for name, value in values.items() if value is not None}
        if examples is None:
            raise QueryError("examples are missing. Give (inputs, targets), a Dataset, or Examples.")
        return CampaignSpec(model=model, data=examples, ablate_fraction=START, **given)
    usual: dict[str, Any] = {"index": None, "output": "margin", "ablation": "zero", "seed": 0}
    names = ["examples"] if examples is not None else []
    names += [name for name, value in values.items() if name not in usual or not _same(value, usual[name])]
    if names:
        raise QueryError(f"{', '.join(names)}: given beside a spec, which has its own. Change the spec.")
    return model if isinstance(model, CampaignSpec) else CampaignSpec.from_file(model)


def _same(value: Any, usual: Any) -> bool:
    return value is usual or (type(value) is type(usual) and bool(value == usual))


def _margins(engine: Engine, spec: CampaignSpec, model: nn.Module) -> tuple[Engine | None, bool]:
    """Returns an engine of the margin where the output is none, and whether predictions can be judged at all."""
    output: Output = engine.output
    if isinstance(output, (Margin, TokenMeanMargin)):
        return None, True
    if not isinstance(output, (Logit, LogProbability, CrossEntropyLoss)):
        return None, False  # a user's own: it may be about anything
    settings = spec.settings
    margins = Engine(
        model,
        engine.index,
        Margin(),
        device=engine.device,
        precision=engine.precision,
        ablation=engine.ablation,
        mode=engine.mode,
        batch_size=settings.batch_size,
        memory_budget=settings.memory_budget,
        speed=engine.speed,
    )
    return margins, True


class _FractionSearch:
    """Goes from the start up while fractions are good, or down until one is; runs more rows where it is not sure."""

    def __init__(
        self, meter: HalvesMeter, fractions: Sequence[float], components: int, examples: int, seed: int
    ) -> None:
        self.meter, self.components, self.examples, self.seed = meter, components, examples, seed
        self.found = [meter.measure(fraction, ROWS) for fraction in fractions]
        self.share = float(meter.right.mean()) if meter.right is not None else float("nan")
        self.judged = self.share >= LEAST_RIGHT

    def choose(self) -> FractionChoice:
        """Returns the choice."""
        # below one component on average most rows ablate nothing: nothing could be learnt there
        open_to_choice = [i for i, m in enumerate(self.found) if m.ablate_fraction * self.components >= 1]
        places = open_to_choice or [len(self.found) - 1]
        at = min(range(len(places)), key=lambda i: abs(np.log(self.found[places[i]].ablate_fraction / START)))
        if self._good(places[at]):
            while at + 1 < len(places) and self._good(places[at + 1]):
                at += 1
        else:
            while at > 0 and not self._good(places[at]):
                at -= 1
        chosen = places[at]
        return FractionChoice(
            self.found[chosen].ablate_fraction,
            self._reason(chosen, places),
            tuple(self.found),
            self.share,
            self.components,
            self.examples,
            self.meter.forwards,
            self.seed,
        )

    def _good(self, place: int) -> bool:
        if not self._sure(self.found[place]):
            self.found[place] = self.meter.extend(self.found[place], MOST_ROWS)
        return self._passes(self.found[place])

    def _passes(self, m: FractionMeasure) -> bool:
        if m.broken or (self.judged and m.right_kept < LEAST_KEPT):
            return False
        return not m.halves < LEAST_HALVES  # NaN: no output changed

    def _sure(self, m: FractionMeasure) -> bool:
        if m.broken:
            return True
        linear = (m.halves - LEAST_HALVES) / max(m.halves_error, 1e-9)
        works = (m.right_kept - LEAST_KEPT) / max(m.right_kept_error, 1e-9) if self.judged else np.inf
        return bool(min(linear, works) > SURE or linear < -SURE or works < -SURE)

    def _reason(self, chosen: int, places: Sequence[int]) -> str:
        good, m = self._passes(self.found[chosen]), self.found[chosen]
        said = f"{m.ablate_fraction:g} {self._said(m)}"
        larger = next((i for i in places if i > chosen), None)
        if not good:
            why = f"none of those tried is good (c >= {LEAST_HALVES:g}, {LEAST_KEPT:.0%} kept); the smallest, {said}"
        elif larger is None:
            why = f"{said}; it is the largest tried"
        else:
            why = f"{said}; {self.found[larger].ablate_fraction:g} {self._said(self.found[larger])}"
        if not self.judged:
            first = (
                "its output does not say what is right"
                if np.isnan(self.share)
                else f"{self.share:.0%} are right at first"
            )
            why += f". Judged by what a line explains alone: {first}"
        return f"{why}."

    def _said(self, m: FractionMeasure) -> str:
        if m.broken:
            return "gives NaN or infinite outputs"
        line = f"a line explains up to r = {m.halves:.2f}" if np.isfinite(m.halves) else "changes no output"
        return f"keeps {m.right_kept:.0%} of the right predictions, {line}" if self.judged else line
