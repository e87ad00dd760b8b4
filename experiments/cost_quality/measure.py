"""Runs every estimator over its budgets on one network: what it costs in plain forwards, how well it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import nn
from zarr.storage import MemoryStore

import ablate
import coar
from coar import Attributions, Gradient
from experiments.cost_quality.config import Config, NetworkConfig
from stores import CampaignStore

BLOCK_ROWS = 250
TEST_SEED, LONG_SEED = 20_000_003, 30_000_001
Say = Callable[[str], None]


@dataclass(frozen=True)
class Record:
    """One estimator at one budget on one network."""

    network: str
    components: int
    ablate_fraction: float
    estimator: str
    budget: int
    cost: float
    seconds: float
    mean: float
    low: float
    high: float
    median: float
    below_half: float


class Bench:
    """One network with its examples, fresh keep-vectors that all estimators are judged by, and a cost meter."""

    def __init__(self, name: str, config: Config, model: nn.Module, index: ablate.ComponentIndex, say: Say) -> None:
        from experiments.cost_quality.networks import digits_examples, input_shape

        self.name, self.config, self.model, self.index, self.say = name, config, model, index, say
        self.network: NetworkConfig = config.networks[name]
        self.examples = digits_examples("test", *input_shape(name)).take(range(config.examples))
        self.engine = ablate.Engine(model, index)
        self.meter = coar.CostMeter(self.engine, self.examples)
        plan = ablate.KeepPlan(len(index), config.test_rows, self.network.ablate_fraction, TEST_SEED)
        self.keep = plan.take(0, config.test_rows)
        self.truth = self.engine.outputs(self.keep, self.examples).numpy()
        self.campaign: CampaignStore | None = None

    def records(self) -> Iterator[Record]:
        """Yields a record per estimator and budget, and says each."""
        for record in self._records():
            self.say(
                f"  {record.estimator:26} {record.budget:>6}  cost {record.cost:>9.1f}  correlation {record.mean:.4f} "
                f"[{record.low:.4f}, {record.high:.4f}]"
            )
            yield record

    def _records(self) -> Iterator[Record]:
        for passes in self.network.passes:
            yield self._measured("gradient", passes, partial(self.estimate, passes=passes))
        mixed = Gradient(passes=100, ablate_fraction=self.network.ablate_fraction, background="mixed")
        yield self._measured("gradient, mixed background", 100, partial(self.estimate, method=mixed))
        hybrid = Gradient(passes=20, ablate_fraction=self.network.ablate_fraction, forward_rows=300)
        yield self._measured("gradient, 300 forward rows", 20, partial(self.estimate, method=hybrid))
        yield from self._regressions()
        for method in self.config.baselines:
            yield self._measured(method, 0, partial(self.estimate, method=method))

    def estimate(self, **settings: Any) -> Attributions:
        """Returns an estimate on all examples, without its own check of quality: all are judged alike."""
        if "method" not in settings or isinstance(settings["method"], str):
            settings = {"ablate_fraction": self.network.ablate_fraction, **settings}
        return coar.estimate(self.model, self.examples, index=self.index, quality_rows=0, **settings)

    def spec(self, rows: int, examples: Any = None, seed: int = 1) -> ablate.CampaignSpec:
        """Returns the spec of a campaign on this network."""
        return ablate.CampaignSpec(
            model=self.model,
            data=self.examples if examples is None else examples,
            index=self.index,
            rows=rows,
            ablate_fraction=self.network.ablate_fraction,
            seed=seed,
            block_rows=BLOCK_ROWS,
        )

    def _regressions(self) -> Iterator[Record]:
        most = max(self.network.rows)
        with self.meter.measure() as cost:
            self.campaign = ablate.run(self.spec(most), MemoryStore(), progress=False)
        methods: tuple[Literal["ridge", "lasso"], ...] = ("ridge", "lasso")
        for rows in self.network.rows:
            part = first_rows(self.campaign, rows)
            for method in methods[: 2 if rows in self.network.lasso_rows else 1]:
                try:
                    with self.meter.measure() as fitting:
                        fitted = coar.fit(part, method=method, held_out=False)
                except coar.FitError as error:
                    self.say(f"  regression, {method}, {rows} rows: {error}")
                    continue
                seconds = cost.seconds * rows / most + fitting.seconds
                forwards = cost.forwards * rows / most + fitting.forwards
                yield self._record(f"regression, {method}", rows, forwards, seconds, fitted)

    def _measured(self, estimator: str, budget: int, run: Callable[[], Attributions]) -> Record:
        with self.meter.measure() as cost:
            attributions = run()
        return self._record(estimator, budget, cost.forwards, cost.seconds, attributions)

    def _record(self, estimator: str, budget: int, cost: float, seconds: float, found: Attributions) -> Record:
        values = coar.counterfactual_correlation(found, self.keep, self.truth)
        values = values[np.isfinite(values)]
        low, high = coar.mean_interval(values)
        return Record(
            network=self.name,
            components=len(self.index),
            ablate_fraction=self.network.ablate_fraction,
            estimator=estimator,
            budget=budget,
            cost=cost,
            seconds=seconds,
            mean=float(values.mean()),
            low=low,
            high=high,
            median=float(np.median(values)),
            below_half=float((values < 0.5).mean()),
        )


def first_rows(campaign: CampaignStore, rows: int) -> CampaignStore:
    """Returns the campaign that would have run only the first `rows` rows: row i depends on (seed, i) alone."""
    if rows == campaign.rows:
        return campaign
    if rows % campaign.block_rows:
        raise ValueError(f"{rows} rows are no whole blocks of {campaign.block_rows}. Change config.toml.")
    identity = campaign.header["identity"]
    header = {**campaign.header, "identity": {**identity, "plan": {**identity["plan"], "rows": rows}}}
    part = CampaignStore.create(
        MemoryStore(),
        header=header,
        components=campaign.components,
        examples=campaign.examples,
        rows=rows,
        block_rows=campaign.block_rows,
    )
    for block in range(rows // campaign.block_rows):
        part.write_block(block, *campaign.read_block(block))
    return part


def coverage(bench: Bench) -> list[dict[str, Any]]:
    """Returns how often intervals cover the weights of a long, independent run, per estimator."""
    config, rows = bench.config, []
    fraction = bench.network.ablate_fraction
    found = bench.estimate(passes=config.calibrated_passes)
    long = bench.estimate(passes=config.long_passes, seed=LONG_SEED)
    table = coar.calibration(found, long)
    rows.append({"network": bench.name, "estimator": "gradient", "budget": config.calibrated_passes, **_rows(table)[0]})
    if config.long_rows:
        few = bench.examples.take(range(config.calibration_examples))
        most = max(bench.network.rows)
        short = ablate.run(bench.spec(most, few), MemoryStore(), progress=False)
        reference = ablate.run(bench.spec(config.long_rows, few, seed=LONG_SEED), MemoryStore(), progress=False)
        truth = coar.fit(reference, method="ols", held_out=False)
        for method in ("ridge", "ols"):
            table = coar.calibration(coar.fit(short, method=method, held_out=False), truth)
            row = {"network": bench.name, "estimator": f"regression, {method}", "budget": most, **_rows(table)[0]}
            rows.append(row)
    for row in rows:
        row["ablate_fraction"] = fraction
        bench.say(f"  95 % intervals of {row['estimator']} at {row['budget']} cover {row['95%']:.3f}")
    return rows


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def at_other_fractions(bench: Bench, rows: int) -> list[dict[str, Any]]:
    """Returns the correlation at several ablate fractions of estimates made at one."""
    found = []
    candidates = {"gradient, 100 passes": bench.estimate(passes=100)}
    if bench.campaign is not None:
        best = max(bench.network.rows)
        candidates[f"regression, ridge, {best} rows"] = coar.fit(bench.campaign, held_out=False)
    for name, attributions in candidates.items():
        table = coar.evaluate(
            attributions,
            bench.engine,
            bench.examples,
            rows=rows,
            ablate_fraction=coar.ABLATE_FRACTIONS,
            seed=TEST_SEED + 1,
        ).table()
        found += [{"network": bench.name, "estimator": name, **row} for row in _rows(table)]
    return found


def to_frame(records: list[Record]) -> pd.DataFrame:
    """Returns records as a table."""
    return pd.DataFrame([asdict(record) for record in records])
