"""Plans against what really is written and computed; spec problems, existing stores, and what cannot be planned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
import coar
import stores
from ablate import CampaignSpec, Examples
from coar.planning import Plan, plan
from coar.planning import speeds as plan_cost
from coar.planning.memory import DEFAULT, estimate_plan, fit_plan, fitted_rows, with_held_out

SHORT = 0.2  # seconds of timing


def _spec(net: nn.Module, examples: Examples, **others: Any) -> CampaignSpec:
    values: dict[str, Any] = {"rows": 300, "ablate_fraction": 0.2, "seed": 1, "block_rows": 64, "passes": 8, **others}
    return CampaignSpec(model=net, data=examples, **values)


@pytest.fixture(scope="module")
def planned(tiny_net: nn.Module, tiny_examples: Examples) -> Plan:
    return plan(_spec(tiny_net, tiny_examples), seconds=SHORT, workers=2)


def _bytes(store: Path) -> int:
    own = (file for file in store.rglob("*") if file.is_file() and "work" not in file.relative_to(store).parts)
    return sum(file.stat().st_size for file in own)


def test_facts(planned: Plan) -> None:
    assert (planned.components, planned.examples, planned.block_rows, planned.workers) == (10, 9, 64, 2)
    regression, gradient = planned.options
    assert (regression.way, regression.budget, regression.purpose) == ("regression", 300, "spec")
    assert (gradient.way, gradient.budget, gradient.purpose) == ("gradient", 8, "spec")
    assert (regression.blocks, regression.blocks_left) == (5, 5)
    assert (gradient.blocks, gradient.blocks_left) == (1, 1)
    assert (regression.forwards, regression.backwards) == (300 * 9, 0)
    assert (gradient.forwards, gradient.backwards) == ((8 + 50) * 9, 8 * 9)


def test_planned_bytes_are_those_of_finished_stores(
    planned: Plan, tiny_net: nn.Module, tiny_examples: Examples, tmp_path: Path
) -> None:
    spec = _spec(tiny_net, tiny_examples)
    campaign = ablate.run(spec, tmp_path / "c.zarr", progress=False)
    coar.fit(campaign, tmp_path / "f.zarr")
    coar.estimate(spec, store=tmp_path / "e.zarr")
    regression, gradient = planned.options
    assert regression.bytes == pytest.approx(_bytes(tmp_path / "c.zarr") + _bytes(tmp_path / "f.zarr"), rel=0.05)
    assert gradient.bytes == pytest.approx(_bytes(tmp_path / "e.zarr"), rel=0.05)


def test_times_add_up(planned: Plan) -> None:
    """Seconds follow from the timed passes; two workers take between half of one and one."""
    speeds = planned.speeds
    regression, gradient = planned.options
    assert speeds.gradient is not None
    passes = 300 * 9 * speeds.ablated
    assert regression.seconds == pytest.approx(speeds.start + passes + regression.fit_seconds)
    # of five blocks one worker has three: 192 rows
    assert regression.wall_seconds == pytest.approx(speeds.start + passes * 192 / 300 + regression.fit_seconds)
    cores = speeds.threads
    assert regression.hours * 3600 == pytest.approx((2 * speeds.start + passes + regression.fit_seconds) * cores)
    each = 8 * speeds.gradient + 50 * speeds.ablated + speeds.finish
    assert gradient.seconds == pytest.approx(speeds.start + 9 * each)
    assert gradient.wall_seconds == gradient.seconds  # one block
    assert all(0 < value < math.inf for value in (speeds.plain, speeds.ablated, speeds.gradient, speeds.start))


def test_more_rows_and_examples_cost_in_proportion(
    monkeypatch: pytest.MonkeyPatch, tiny_net: nn.Module, tiny_examples: Examples
) -> None:
    speeds = plan_cost.Speeds("cpu", 1, 4, 0.0, 0.0, 1e-3, 2e-3, 5e-3, 1e-3, 0.0, 0.0)
    monkeypatch.setattr("coar.planning.planner.measure_speeds", lambda *arguments: speeds)
    one, four = (plan(_spec(tiny_net, tiny_examples, rows=rows)).options[0] for rows in (128, 512))
    assert one.seconds == pytest.approx(128 * 9 * 2e-3)
    assert four.seconds == pytest.approx(4 * one.seconds)
    half = plan(_spec(tiny_net, tiny_examples.take(range(3)), rows=128)).options[0]
    assert half.seconds == pytest.approx(one.seconds / 3)


def test_without_rows_several_are_planned_for(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples, rows=None), seconds=SHORT)
    rows = [option.budget for option in found.options if option.way == "regression"]
    assert rows == [20, 40, 80]  # half, one and two per component are fewer than a fit takes
    assert [o.budget for o in found.options if o.way == "gradient"] == [5, 8, 20, 50, 100]
    assert "The spec has no rows" in found.text()
    lows = [option.quality.low for option in found.options if option.way == "regression"]
    assert lows == sorted(lows)


def test_passes_auto(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples, passes="auto"), seconds=SHORT)
    assert [o.budget for o in found.options if o.way == "gradient"] == [10, 20, 50, 100, 200]
    assert "passes = 'auto'" in found.text()


def test_a_target_adds_the_budgets_that_reached_it(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples), target=0.7, seconds=SHORT)
    added = {option.way: option for option in found.options if option.purpose == "target"}
    assert set(added) == {"regression", "gradient"} == set(found.needs)
    for way, option in added.items():
        need = found.needs[way]
        assert all(option.quality.networks[network] >= 0.7 for network in need.budgets)
        assert not any(value >= 0.7 for value in need.short.values())
    assert "A correlation of 0.7 by regression:" in found.text()


def test_a_target_that_nothing_reached(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples), target=0.99999, seconds=SHORT)
    assert {option.purpose for option in found.options} == {"spec"}
    assert "no measured network had a correlation of 0.99999" in found.recommendation
    assert "by gradient: never reached" in found.text()


def test_an_unfinished_campaign_costs_what_is_left(
    tiny_net: nn.Module, tiny_examples: Examples, tmp_path: Path
) -> None:
    spec = _spec(tiny_net, tiny_examples)
    ablate.run(spec, tmp_path / "c.zarr", progress=False)
    (tmp_path / "c.zarr/ledger/c/1/0").unlink()
    found = plan(spec, store=tmp_path / "c.zarr", seconds=SHORT)
    option = found.options[0]
    assert (option.blocks, option.blocks_left) == (5, 1)
    assert f"{tmp_path}/c.zarr exists: 236 of 300 rows are finished; times are of what is left." in found.notes
    expected = found.speeds.start + 300 / 5 * 9 * found.speeds.ablated + option.fit_seconds
    assert option.seconds == pytest.approx(expected)


def test_a_finished_campaign_costs_its_fit(tiny_net: nn.Module, tiny_examples: Examples, tmp_path: Path) -> None:
    spec = _spec(tiny_net, tiny_examples)
    ablate.run(spec, tmp_path / "c.zarr", progress=False)
    coar.estimate(spec, store=tmp_path / "c-estimate.zarr")
    regression, gradient = plan(spec, store=tmp_path / "c.zarr", seconds=SHORT).options
    assert (regression.blocks_left, regression.seconds) == (0, regression.fit_seconds)
    assert (gradient.blocks_left, gradient.seconds) == (0, 0.0)


def test_another_campaigns_store_is_refused(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    place = MemoryStore()
    ablate.run(_spec(tiny_net, tiny_examples), place, progress=False)
    with pytest.raises(stores.StoreMismatchError, match=r"plan\.seed: 1 -> 2"):
        plan(_spec(tiny_net, tiny_examples, seed=2), store=place, seconds=SHORT)


def test_another_estimate_is_named(tiny_net: nn.Module, tiny_examples: Examples, tmp_path: Path) -> None:
    coar.estimate(_spec(tiny_net, tiny_examples, passes=3), store=tmp_path / "c-estimate.zarr")
    found = plan(_spec(tiny_net, tiny_examples), store=tmp_path / "c.zarr", seconds=SHORT)
    assert f"{tmp_path}/c-estimate.zarr is another estimate (it differs in passes): name another place" in found.text()
    assert found.options[1].blocks_left == 1


def test_nothing_is_written_or_changed(
    tiny_net: nn.Module, tiny_examples: Examples, tmp_path: Path, untouched: Callable[..., Any]
) -> None:
    with untouched(tiny_net):
        plan(_spec(tiny_net, tiny_examples, store=str(tmp_path / "c.zarr")), seconds=SHORT)
    assert list(tmp_path.iterdir()) == []


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(x)).detach()
        return logits


def test_a_model_without_gradients_is_planned_by_regression() -> None:
    torch.manual_seed(0)
    data = Examples(torch.randn(4, 2), [0, 1, 0, 1])
    found = plan(CampaignSpec(model=_Detached().eval(), data=data, rows=50, ablate_fraction=0.2), seconds=SHORT)
    assert [option.way for option in found.options] == ["regression"]
    assert found.speeds.gradient is None
    assert "No gradient estimate: Gradients say nothing here" in found.text()
    assert "gradient pass not possible" in found.text()
    assert found.recommendation.startswith("Take regression, 50 rows")


def test_a_fraction_that_gradients_do_not_offer(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples, ablate_fraction=0.7), seconds=SHORT)
    assert [option.way for option in found.options] == ["regression"]
    assert "No gradient estimate: ablate_fraction is 0.7" in found.text()


def test_several_fractions(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples, ablate_fraction=(0.1, 0.3)), seconds=SHORT)
    assert "gradients are planned for 0.1 alone" in found.text()
    assert len(found.options) == 2


def test_rows_that_cannot_be_stored(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    with pytest.raises(stores.StoreError, match="expected 1 to 100,000 blocks"):
        plan(_spec(tiny_net, tiny_examples, rows=100_001, block_rows=1), seconds=SHORT)


def test_a_choice_that_cannot_be_stored_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tiny_net: nn.Module, tiny_examples: Examples
) -> None:
    monkeypatch.setattr("coar.planning.planner.ROWS_PER_COMPONENT", (4.0, 20_000.0))
    found = plan(_spec(tiny_net, tiny_examples, rows=None, block_rows=1), seconds=SHORT)
    assert [option.budget for option in found.options if option.way == "regression"] == [40]
    assert any(note.startswith("200,000 rows cannot be stored: ") for note in found.notes)


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (7, "The spec has 7 rows, and a fit needs at least 20."),
        (20, "Of the spec's rows 18 are fitted, fewer than there are components (20): a regression of so few is poor."),
    ],
)
def test_too_few_rows_are_named(rows: int, note: str) -> None:
    net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 2)).eval()
    data = Examples(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), [0, 1, 0, 1])
    found = plan(CampaignSpec(model=net, data=data, rows=rows, ablate_fraction=0.2), seconds=SHORT)
    assert found.components == 20
    assert note in found.notes


def test_idle_workers_are_named(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    found = plan(_spec(tiny_net, tiny_examples), workers=7, seconds=SHORT)
    assert "regression, 300 rows: 5 blocks are left, so that 2 of 7 workers find nothing to do." in found.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers is 0, expected at least 1."),
        ({"target": 1.0}, "target is 1.0, expected a correlation between 0 and 1 (exclusive)."),
        ({"seconds": math.nan}, "seconds is nan, expected a number above 0."),
    ],
)
def test_arguments_that_make_no_sense(
    tiny_net: nn.Module, tiny_examples: Examples, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(coar.QueryError) as raised:
        plan(_spec(tiny_net, tiny_examples), **arguments)
    assert str(raised.value) == message


def test_no_components_and_no_numbers(tiny_net: nn.Module, tiny_examples: Examples) -> None:
    none = {"kinds": ["linear_neuron"], "exclude": ["*"]}
    with pytest.raises((coar.FitError, ablate.AblateError)):
        plan(_spec(tiny_net, tiny_examples, components=none), seconds=SHORT)
    inputs = tiny_examples.inputs().clone()
    inputs[2, 0, 0, 0] = math.nan
    sick = Examples(inputs, tiny_examples.targets)
    with pytest.raises(ablate.NonFiniteOutputError):
        plan(_spec(tiny_net, sick), seconds=SHORT)


def test_table_and_json(planned: Plan) -> None:
    table = planned.table()
    assert list(table["way"]) == ["regression", "gradient"]
    assert (table["correlation_low"] <= table["correlation_high"]).all()
    facts = json.loads(json.dumps(planned.as_dict(), allow_nan=False))
    assert facts["components"] == 10
    assert [option["budget"] for option in facts["options"]] == [300, 8]
    assert facts["options"][0]["quality"]["low"] == planned.options[0].quality.low
    assert "a guide, not a promise" in facts["caveat"]


def test_text_says_what_was_measured_and_where_the_curve_is_from(planned: Plan) -> None:
    text = planned.text()
    assert text.startswith("10 components x 9 examples, ablate fraction 0.2, blocks of 64 rows; 2 workers.\n")
    assert "Timed on cpu" in text
    assert planned.recommendation in text
    assert text.endswith(
        "Expected correlations were measured on small networks trained on handwritten digits "
        "(docs/benchmarks/cost_quality.csv); they are a guide, not a promise. What they are for your model, "
        "`coar estimate` and `coar fit` measure on held-out keep-vectors."
    )


def test_timed_examples_are_few_where_passes_are_slow(
    monkeypatch: pytest.MonkeyPatch, tiny_net: nn.Module, tiny_examples: Examples
) -> None:
    """With a limit that a single pass exceeds, no more than the fewest are timed; with a large one, a batch."""
    many = Examples(tiny_examples.inputs().repeat(20, 1, 1, 1), tiny_examples.targets.repeat(20))
    assert plan(_spec(tiny_net, many), seconds=1e-9).speeds.timed_examples == plan_cost.FEWEST
    assert plan(_spec(tiny_net, many, batch_size=32), seconds=60).speeds.timed_examples == 32


def test_fitted_rows_are_those_of_fit(tiny_campaign: stores.CampaignStore) -> None:
    assert coar.fit(tiny_campaign).header["identity"]["held_out"] is True
    assert fitted_rows(300) == 270
    assert with_held_out(270) == 300


def test_the_fits_memory_is_what_the_fit_asks_for(tiny_campaign: stores.CampaignStore) -> None:
    """At the planned bytes the fit runs, well below it refuses."""
    needed, block = fit_plan(300, 10, 9, 64)
    assert block == 9
    coar.fit(tiny_campaign, MemoryStore(), memory=needed)
    with pytest.raises(coar.FitError, match="is too small to fit"):
        coar.fit(tiny_campaign, MemoryStore(), memory=needed // 2)


def test_the_estimates_block_is_that_of_estimate(
    monkeypatch: pytest.MonkeyPatch, tiny_net: nn.Module, tiny_examples: Examples
) -> None:
    """Under a budget that holds fewer examples than there are, the planned block is the one that is stored."""
    estimator = coar.Gradient(passes=2, ablate_fraction=0.2)
    whole, _ = estimate_plan(estimator, tiny_examples, 10, 50, 256)
    fixed, _ = estimate_plan(estimator, tiny_examples.take([0]), 10, 50, 256)
    tight = (whole + fixed) // 2
    monkeypatch.setattr("coar.planning.memory.DEFAULT", tight)
    _, block = estimate_plan(estimator, tiny_examples, 10, 50, 256)
    place = MemoryStore()
    coar.estimate(_spec(tiny_net, tiny_examples), method=estimator, store=place, memory=tight)
    assert stores.AttributionStore.open(place).block_examples == block < 9
    monkeypatch.setattr("coar.planning.memory.DEFAULT", 1000)
    with pytest.raises(coar.FitError, match="default budget is 1,000"):
        estimate_plan(estimator, tiny_examples, 10, 50, 256)
    assert DEFAULT == 2 * 2**30
