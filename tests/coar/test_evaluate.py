"""Judging attributions: the correlations are numpy's, and rows or examples that would flatter are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import nn

import ablate
import coar
from ablate import ComponentIndex, Engine, Examples, KeepPlan
from coar.evaluate import correlation, explained_share
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


def test_evaluate_at_another_fraction(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    found = coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=4, ablate_fraction=0.5)
    expected = tiny_engine.outputs(KeepPlan(10, 4, 0.5, 1_000_003).take(0, 4), tiny_examples).numpy()
    np.testing.assert_array_equal(found.actual, expected)
    with pytest.raises(ablate.KeepError, match=r"ablate_fraction is 1\.5, expected a number between 0 and 1"):
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, rows=4, ablate_fraction=1.5)


def test_summary() -> None:
    correlations = np.array([0.1, 0.4, np.nan, 0.8, 0.9, 1.0])
    empty = np.zeros((0, 0), dtype=np.float32)
    summary = coar.Evaluation(0.1, 2, 3, correlations, empty, empty).summary()
    values = [0.1, 0.4, 0.8, 0.9, 1.0]
    assert summary.to_dict() == {
        "mean": pytest.approx(np.mean(values)),
        "25%": 0.4,
        "median": 0.8,
        "75%": 0.9,
        "share below 0.5": 0.4,
        "examples": 5,
    }
    nothing = coar.Evaluation(0.1, 2, 3, np.array([np.nan]), empty, empty).summary()
    assert nothing.drop("examples").isna().all()
    assert nothing["examples"] == 0


def test_evaluate_refuses_the_campaigns_rows(
    tiny_fit: coar.Attributions, tiny_engine: Engine, tiny_examples: Examples
) -> None:
    with pytest.raises(coar.QueryError) as refused:
        coar.evaluate(tiny_fit, tiny_engine, tiny_examples, seed=1)
    assert str(refused.value) == (
        "seed=1 is the campaign's: its keep-vectors were used for fitting. Give another seed."
    )


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


def test_fitting_leaves_the_model_and_the_world_untouched(
    tiny_campaign: CampaignStore, tiny_net: nn.Module, untouched: Any
) -> None:
    with untouched(tiny_net):
        coar.fit(tiny_campaign)
        with pytest.raises(coar.FitError, match="too small"):
            coar.fit(tiny_campaign, memory=1)
