"""The package's copy of the guide's curves, and reading between their points."""

from __future__ import annotations

from pathlib import Path

import pytest

from coar.planning import curve as plan_curve
from coar.planning import curve_table as plan_curve_table
from coar.planning.curve import Curve, curves, expected, needed, table_of, write_table

ROOT = Path(__file__).parents[3]
LINE = Curve("net", "gradient", (2.0, 8.0, 32.0), (0.5, 0.7, 0.9))


def test_the_copy_is_the_benchmarks() -> None:
    csv = (ROOT / plan_curve_table.SOURCE).read_text(encoding="utf-8")
    assert table_of(csv.splitlines()) == plan_curve_table.TABLE, (
        "the benchmark was measured anew: run `python -m coar.planning.curve docs/benchmarks/cost_quality.csv`"
    )


def test_writing_the_copy_gives_the_module_as_it_is(tmp_path: Path) -> None:
    write_table(ROOT / plan_curve_table.SOURCE, tmp_path / "table.py")
    assert plan_curve_table.__file__ is not None
    assert (tmp_path / "table.py").read_text() == Path(plan_curve_table.__file__).read_text()


def test_what_is_copied() -> None:
    lines = [
        "network,components,ablate_fraction,estimator,budget,cost,mean,low,high",
        "a,10,0.1,gradient,2,9.9,0.5,0.4,0.6",
        'a,10,0.1,"gradient, mixed background",2,9.9,0.1,0.4,0.6',
        'a,10,0.1,"regression, ridge",20,9.9,0.25,0.4,0.6',
        "a,10,0.1,random,0,9.9,0.0,0.4,0.6",
    ]
    assert table_of(lines) == (
        "network,components,ablate_fraction,estimator,budget,mean\n"
        "a,10,0.1,gradient,2,0.5\n"
        'a,10,0.1,"regression, ridge",20,0.25\n'
    )


@pytest.mark.parametrize("way", ["regression", "gradient"])
def test_curves_go_through_the_measured_points(way: str) -> None:
    found = curves(way)
    assert len(found) >= 2
    for curve in found:
        assert list(curve.budgets) == sorted(curve.budgets)
        for budget, correlation in zip(curve.budgets, curve.correlations, strict=True):
            assert curve.at(budget) == pytest.approx(correlation, abs=1e-12)


def test_budgets_of_regression_are_rows_per_component() -> None:
    points = [row.split(",") for row in plan_curve_table.TABLE.splitlines() if "regression" in row]
    network, components, *_, rows, mean = points[0]
    curve = next(curve for curve in curves("regression") if curve.network == network)
    assert curve.at(int(rows) / int(components)) == pytest.approx(float(mean))


@pytest.mark.parametrize(
    ("budget", "correlation"), [(1, 0.5), (2, 0.5), (4, 0.6), (8, 0.7), (16, 0.8), (32, 0.9), (500, 0.9)]
)
def test_between_points_it_is_linear_in_log_budget(budget: float, correlation: float) -> None:
    assert LINE.at(budget) == pytest.approx(correlation)


@pytest.mark.parametrize(("target", "budget"), [(0.4, 2), (0.5, 2), (0.6, 4), (0.7, 8), (0.8, 16), (0.9, 32)])
def test_the_budget_for_a_correlation(target: float, budget: float) -> None:
    assert LINE.needed(target) == pytest.approx(budget)
    assert LINE.needed(0.91) is None


def test_a_curve_that_dips_is_read_where_it_first_reaches_the_target() -> None:
    dips = Curve("net", "gradient", (1.0, 2.0, 4.0, 8.0), (0.2, 0.6, 0.5, 0.9))
    assert dips.needed(0.6) == pytest.approx(2)
    assert dips.needed(0.7) == pytest.approx(4 * 2**0.5)


def test_expected_is_the_range_over_networks() -> None:
    least = max(curve.budgets[0] for curve in curves("gradient"))
    most = min(curve.budgets[-1] for curve in curves("gradient"))
    found = expected("gradient", least)
    assert found.low == min(found.networks.values())
    assert found.high == max(found.networks.values())
    assert set(found.networks) == {curve.network for curve in curves("gradient")}
    assert not found.below
    assert not found.above
    assert expected("gradient", least / 2).below
    assert str(expected("gradient", least / 2)).startswith("at most ")
    assert expected("gradient", 2 * most).above


def test_needed_tells_who_reached_it_and_who_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = Curve("other", "gradient", (2.0, 8.0), (0.1, 0.3))
    monkeypatch.setattr(plan_curve, "curves", lambda way: (LINE, worse))
    found = needed("gradient", 0.6)
    assert found.budgets == {"net": pytest.approx(4)}
    assert found.short == {"other": 0.3}
