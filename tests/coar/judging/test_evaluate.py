"""Judging attributions: the correlations are numpy's, and rows or examples that would flatter are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import ablate
import coar
from ablate import ComponentIndex, Engine, Examples, KeepPlan
from coar.statistics import correlation, explained_share, mean_interval, rank_correlation
from stores import CampaignStore

Floats = npt.NDArray[np.floating[Any]]


@pytest.fixture(scope="module")
def tiny_engine(tiny_net: nn.Module) -> Engine:
    """The engine the tiny campaign ran with."""
    return Engine(tiny_net, ComponentIndex.from_model(tiny_net))


def test_counterfactual_correlation_is_numpys(
    fitted: coar.Attributions, draw_keep: Callable[..., npt.NDArray[np.bool_]]
) -> None:
    keep = draw_keep(60, 12, 0.5, seed=9)
    outputs = fitted.predict(keep) + np.random.default_rng(1).normal(size=(60, 30))
    found = coar.counterfactual_correlation(fitted, keep, outputs)
    expected = [np.corrcoef(p, y)[0, 1] for p, y in zip(fitted.predict(keep).T, outputs.T, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    some = coar.counterfactual_correlation(fitted, keep, outputs[:, [4, 2]], examples=[4, 2])
    np.testing.assert_allclose(some, found[[4, 2]], rtol=1e-12)


def test_the_planted_truth_predicts_perfectly(
    fitted: coar.Attributions, truth: tuple[Floats, Floats], draw_keep: Callable[..., npt.NDArray[np.bool_]]
) -> None:
    weights, bias = truth
    keep = draw_keep(50, 12, 0.6, seed=10)
    found = coar.counterfactual_correlation(fitted, keep, keep @ weights.T + bias)
    np.testing.assert_allclose(found, 1, atol=1e-9)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6, 1e-30])
def test_constants_have_no_correlation(constant: float) -> None:
    """Also 0.1, whose mean over three rows is not 0.1."""
    column = np.arange(3.0)
    observed = np.stack([np.full(3, constant), column, column], axis=1)
    predicted = np.stack([column, np.full(3, constant), 2 * column + 1], axis=1)
    np.testing.assert_allclose(correlation(predicted, observed), [np.nan, np.nan, 1.0])
    assert np.isnan(explained_share(predicted, observed)).tolist() == [True, False, False]


def test_counterfactual_correlation_refuses(fitted: coar.Attributions) -> None:
    keep = np.ones((3, 12), dtype=np.bool_)
    with pytest.raises(coar.QueryError) as refused:
        coar.counterfactual_correlation(fitted, keep, np.ones((30, 3)))
    assert str(refused.value) == "outputs have shape (30, 3), expected (3, 30): (rows, examples)."
    with pytest.raises(coar.QueryError) as refused:
        coar.counterfactual_correlation(fitted, keep[:1], np.ones((1, 30)))
    assert str(refused.value) == "A correlation needs at least 2 keep-vectors, got 1."


def test_evaluate_runs_the_model_on_fresh_rows(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples, tiny_net: nn.Module, untouched: Any
) -> None:
    with untouched(tiny_net):
        found = coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=50, seed=77)
    keep = KeepPlan(10, 50, 0.2, 77).take(0, 50)
    actual = ablate.reference_outputs(
        tiny_net, tiny_engine.index, keep, tiny_examples.inputs(), tiny_examples.targets
    ).numpy()
    assert (found.ablate_fraction, found.rows, found.seed) == (0.2, 50, 77)
    np.testing.assert_allclose(found.actual, actual, atol=1e-5)
    np.testing.assert_array_equal(found.predicted, tiny_fit.predict(keep))
    np.testing.assert_allclose(found.correlations, coar.counterfactual_correlation(tiny_fit, keep, actual), atol=1e-5)
    assert found.summary()["mean"] > 0.8


def test_evaluate_takes_a_pair(tiny_engine: Engine, tiny_net: nn.Module, tiny_examples: Examples) -> None:
    """Of what the campaign calls its examples by default."""
    data = (tiny_examples.inputs(), tiny_examples.targets)
    attributions = coar.estimate(tiny_net, data, passes=4, ablate_fraction=0.2)
    found = coar.evaluate(attributions, tiny_engine, data, rows=5)
    np.testing.assert_array_equal(
        found.actual, coar.evaluate(attributions, tiny_engine, Examples(*data), rows=5).actual
    )


def test_evaluate_at_another_fraction(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    found = coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=4, ablate_fraction=0.5)
    expected = tiny_engine.outputs(KeepPlan(10, 4, 0.5, 1_000_003).take(0, 4), tiny_examples).numpy()
    np.testing.assert_array_equal(found.actual, expected)
    with pytest.raises(ablate.KeepError, match=r"ablate_fraction is 1\.5, expected a number between 0 and 1"):
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=4, ablate_fraction=1.5)


def test_several_fractions_are_each_what_one_is(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples, tiny_net: nn.Module, untouched: Any
) -> None:
    with untouched(tiny_net):
        found = coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=30, ablate_fraction=(0.3, 0.1, 0.2), seed=5)
    assert [f.ablate_fraction for f in found.fractions] == [0.3, 0.1, 0.2]
    for fraction in (0.3, 0.1, 0.2):
        alone = coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=30, ablate_fraction=fraction, seed=5)
        for name in ("correlations", "spearman", "predicted", "actual"):
            np.testing.assert_array_equal(getattr(found.at(fraction), name), getattr(alone, name))
        assert alone.table().iloc[0].drop("ablate_fraction").to_dict() == alone.summary().to_dict()
    table = found.table()
    assert list(table) == [
        "ablate_fraction",
        *("mean", "low", "high", "25%", "median", "75%"),
        *("share below 0.5", "spearman", "examples"),
    ]
    assert table["ablate_fraction"].tolist() == [0.3, 0.1, 0.2]
    assert table["examples"].dtype == np.int64
    means = [f.summary()["mean"] for f in found.fractions]
    assert table["mean"].tolist() == means
    assert repr(found) == (
        f"<Evaluation: 30 fresh keep-vectors, mean correlation {means[0]:.3f} at 30 %, {means[1]:.3f} at 10 %, "
        f"{means[2]:.3f} at 20 % ablated>"
    )


ASKED: dict[str, Callable[[coar.Evaluation], object]] = {
    "ablate_fraction": lambda e: e.ablate_fraction,
    "correlations": lambda e: e.correlations,
    "spearman": lambda e: e.spearman,
    "predicted": lambda e: e.predicted,
    "actual": lambda e: e.actual,
    "summary": lambda e: e.summary(),
}


@pytest.mark.parametrize("asked", ASKED)
def test_of_several_fractions_one_must_be_chosen(asked: str) -> None:
    empty = np.zeros((0, 0), dtype=np.float32)
    none = np.zeros(0)
    several = tuple(coar.FractionEvaluation(f, none, none, empty, empty) for f in (0.1, 0.2))
    with pytest.raises(coar.QueryError) as refused:
        ASKED[asked](coar.Evaluation(9, 1, several))
    assert str(refused.value) == (
        "This evaluation has several ablate fractions, 0.1, 0.2: choose one with at(...), or see table()."
    )
    with pytest.raises(coar.QueryError) as refused:
        coar.Evaluation(9, 1, several).at(0.3)
    assert str(refused.value) == "Nothing was evaluated at ablate fraction 0.3, only at 0.1, 0.2."


def test_a_campaign_of_several_fractions_is_evaluated_at_each(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    several = coar.open_attributions(tiny_fit.store)
    several.header = copy.deepcopy(tiny_fit.header)
    several.header["identity"]["of"]["plan"]["ablate_fraction"] = [0.1, 0.4]
    found = coar.evaluate(several, tiny_engine, tiny_examples, rows=4)
    assert [f.ablate_fraction for f in found.fractions] == [0.1, 0.4]


def test_the_plan_of_an_estimate_without_rows_is_enough(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    estimate = coar.open_attributions(tiny_fit.store)
    estimate.header = copy.deepcopy(tiny_fit.header)
    estimate.header["identity"]["of"]["plan"] = {"ablate_fraction": 0.2, "seed": 8}
    assert coar.evaluate(estimate, tiny_engine, tiny_examples, rows=4, seed=1).ablate_fraction == 0.2
    with pytest.raises(coar.QueryError, match="seed=8 is the one that"):
        coar.evaluate(estimate, tiny_engine, tiny_examples, rows=4, seed=8)


def test_a_fraction_that_ablates_nothing_has_no_correlation(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    found = coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=5, ablate_fraction=(1e-9, 0.2))
    assert [f.undefined for f in found.fractions] == [9, 0]
    assert found.table()["examples"].tolist() == [0, 9]
    assert np.isnan(found.at(1e-9).summary().drop("examples").to_numpy()).all()


def test_the_fractions_of_the_published_range() -> None:
    assert coar.ABLATE_FRACTIONS == (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def test_summary() -> None:
    correlations = np.array([0.1, 0.4, np.nan, 0.8, 0.9, 1.0])
    spearman = np.array([0.5, 0.25, np.nan, 0.5, 0.75, 1.0])
    empty = np.zeros((0, 0), dtype=np.float32)
    summary = coar.FractionEvaluation(0.1, correlations, spearman, empty, empty).summary()
    values = [0.1, 0.4, 0.8, 0.9, 1.0]
    low, high = mean_interval(values)
    assert summary.to_dict() == {
        "mean": pytest.approx(np.mean(values)),
        "low": low,
        "high": high,
        "25%": 0.4,
        "median": 0.8,
        "75%": 0.9,
        "share below 0.5": 0.4,
        "spearman": 0.6,
        "examples": 5,
    }
    nothing = coar.FractionEvaluation(0.1, np.array([np.nan]), np.array([np.nan]), empty, empty).summary()
    assert nothing.drop("examples").isna().all()
    assert nothing["examples"] == 0


@given(
    hnp.arrays(np.float64, (7, 3), elements=st.integers(-3, 3)),
    hnp.arrays(np.float64, (7, 3), elements=st.integers(-3, 3)),
)
def test_rank_correlation_is_scipys(predicted: Floats, observed: Floats) -> None:
    found = rank_correlation(predicted, observed)
    for column in range(3):
        x, y = predicted[:, column], observed[:, column]
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert np.isnan(found[column])
        else:
            assert found[column] == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def test_mean_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=40)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", random_state=np.random.default_rng(3)
    ).confidence_interval
    assert mean_interval(values, seed=3) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mean_interval_does_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=40)
    whole = mean_interval(values)
    monkeypatch.setattr("coar.statistics.RESAMPLED_AT_A_TIME", 300)
    assert mean_interval(values) == whole


def test_mean_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    covers = [low <= 0.0 <= high for low, high in (mean_interval(generator.normal(size=60)) for _ in range(300))]
    assert 0.90 <= np.mean(covers) <= 0.98
    narrow = mean_interval(generator.normal(size=60), level=0.5)
    wide = mean_interval(generator.normal(size=60), level=0.99)
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])


def test_mean_interval_leaves_the_world_alone(untouched: Any) -> None:
    with untouched():
        assert mean_interval([1.0, 2.0, np.nan, 4.0]) == mean_interval([1.0, 2.0, 4.0])
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert np.isnan(mean_interval([0.5])).all()
    assert np.isnan(mean_interval([np.nan, 0.5])).all()
    assert np.isnan(mean_interval([])).all()


def test_evaluate_refuses_the_campaigns_rows(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    with pytest.raises(coar.QueryError) as refused:
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, seed=1)
    assert str(refused.value) == ("seed=1 is the one that these attributions were made with. Give another seed.")


def test_evaluate_refuses_other_examples(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    for other in (
        tiny_examples.take([0, 1]),
        tiny_examples.take([1, 0, 2, 3, 4, 5, 6, 7, 8]),
        Examples(tiny_examples.inputs() + 1, tiny_examples.targets, tiny_examples.ids, tiny_examples.groups),
        Examples(tiny_examples.inputs(), 2 - tiny_examples.targets, tiny_examples.ids, tiny_examples.groups),
    ):
        with pytest.raises(coar.QueryError) as refused:
            coar.evaluate(tiny_fit, tiny_engine, other)
        assert str(refused.value) == (
            f"These {len(other)} examples are not the 9 of the attributions (data hash {other.hash[:12]}, expected "
            f"{tiny_examples.hash[:12]}). Give all of them, in the campaign's order."
        )


def test_evaluate_refuses_another_engine(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_net: nn.Module, tiny_examples: Examples
) -> None:
    neurons = ComponentIndex.from_model(tiny_net, kinds=["linear_neuron"])
    with pytest.raises(coar.QueryError) as refused:
        coar.evaluate(tiny_fit, Engine(tiny_net, neurons), tiny_examples)
    assert str(refused.value) == (
        f"The engine has index {neurons.hash[:12]}, the attributions {tiny_engine.index.hash[:12]}."
    )
    with pytest.raises(coar.QueryError) as refused:
        coar.evaluate(tiny_fit, Engine(tiny_net, tiny_engine.index, "logit"), tiny_examples)
    assert str(refused.value) == (
        "The engine's output is logit, the attributions are of margin (ablate.outputs.Margin)."
    )


def test_evaluate_refuses_a_single_row(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    with pytest.raises(coar.QueryError) as refused:
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=1)
    assert str(refused.value) == "A correlation needs at least 2 keep-vectors, got rows=1."


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((), "No ablate fraction given: pass one, several, or None for that of the attributions."),
        ((0.1, 0.2, 0.1), "An ablate fraction is given twice: 0.1, 0.2, 0.1."),
    ],
)
def test_evaluate_refuses_fractions(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples, fractions: Any, message: str
) -> None:
    with pytest.raises(coar.QueryError) as refused:
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, ablate_fraction=fractions)
    assert str(refused.value) == message


def test_a_bad_fraction_is_found_before_anything_runs(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "outputs", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ablate.KeepError, match=r"ablate_fraction is 0\.0, expected a number between 0 and 1"):
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, ablate_fraction=(0.1, 0.0))


def test_fitting_leaves_the_model_and_the_world_untouched(
    tiny_campaign: CampaignStore, tiny_net: nn.Module, untouched: Any
) -> None:
    with untouched(tiny_net):
        coar.fit(tiny_campaign)
        with pytest.raises(coar.FitError, match="too small"):
            coar.fit(tiny_campaign, memory=1)
