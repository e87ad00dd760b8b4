"""COAR-Edit: the specification's worked examples, the statistic computed in another way, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

import ablate
import coar
from ablate import ComponentIndex, Engine, Examples

WriteAttributions = Callable[..., coar.Attributions]
Floats = npt.NDArray[np.floating[Any]]

# Positions 0 and 1 are the target, 2, 3 and 4 the reference; column means are in the test below.
WEIGHTS = np.array(
    [
        [1.0, -2, 0, 3, 0, 5, 1],
        [3.0, -4, 0, 3, 0, 7, 1],
        [0.0, 1, 0, 3, 0, 9, 2],
        [0.0, 2, 0, 3, 0, 1, 2],
        [3.0, 3, 0, 3, 0, 2, 2],
    ]
)


@pytest.fixture(scope="module")
def attributions(write_attributions: WriteAttributions) -> coar.Attributions:
    """`WEIGHTS` as attributions."""
    return write_attributions(WEIGHTS)


def _column(*values: float) -> Floats:
    return np.array(values)[:, None]


@pytest.mark.parametrize(
    ("target", "reference", "score"),
    [
        ([1, 3], [0, 0, 0, 4], 0.894427),  # ddof = 1 would give 0.707107
        ([2], [0, 2], 1.414214),  # a single target example
        ([2], [2], 0.0),
        ([2, 2], [2, 2, 2], 0.0),
        ([0], [0], 0.0),
        ([2], [1], 1.0),  # nothing varies: the difference of the means
        ([1], [2, 2], -1.0),
        ([3], [2, 2], 1.0),
    ],
)
def test_worked_examples(target: list[float], reference: list[float], score: float) -> None:
    found = coar.coar_scores(_column(*target), _column(*reference))
    np.testing.assert_allclose(found, [score], atol=5e-7)


def test_worked_prediction(write_attributions: WriteAttributions) -> None:
    """w = (+2, -1, 0), b = 1: f = 2; without component 1: 3; without component 0: 0."""
    attributions = write_attributions([[2, -1, 0], [0, 0, 0]], bias=[1, 0])
    keep = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1]], dtype=np.bool_)
    assert attributions.predict(keep, [0])[:, 0].tolist() == [2, 3, 0]
    edit = coar.coar_edit(attributions, target=[0], reference=[1], k=1)
    assert edit.selection.ids == (1,)
    assert edit.details["predicted_change_target"] == 1


_sets = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 8))


@given(data=st.data(), sizes=_sets)
def test_the_statistic_is_welchs_with_variances_over_n(data: st.DataObject, sizes: tuple[int, int, int]) -> None:
    n, m, components = sizes
    values = st.floats(-100, 100, width=32)
    t = data.draw(arrays.arrays(np.float64, (n, components), elements=values))
    r = data.draw(arrays.arrays(np.float64, (m, components), elements=values))
    found = coar.coar_scores(t, r)
    assert np.isfinite(found).all()
    spread = np.sqrt(t.var(axis=0) / n + r.var(axis=0) / m)
    rounding = np.finfo(np.float32).eps * max(np.abs(t).max(), np.abs(r).max())
    for j in range(components):
        difference = t[:, j].mean() - r[:, j].mean()
        if (spread <= rounding).all():
            assert found[j] == (0.0 if abs(difference) <= rounding else difference)
            continue
        if spread[j] <= rounding:
            np.testing.assert_allclose(found[j], difference / rounding)
            continue
        # scipy's Welch statistic divides whatever variance it is given by n: here the one with ddof = 0
        expected, _ = scipy.stats.ttest_ind_from_stats(
            t[:, j].mean(), t[:, j].std(), n, r[:, j].mean(), r[:, j].std(), m, equal_var=False
        )
        np.testing.assert_allclose(found[j], expected, rtol=1e-9)


def test_ranking_raise_and_lower_with_ties_by_id(attributions: coar.Attributions) -> None:
    scores = coar.coar_scores(WEIGHTS[:2], WEIGHTS[2:])
    assert scores[[2, 3, 4]].tolist() == [0, 0, 0]
    assert -1e7 < scores[6] < -1e5  # it does not vary: its difference over the rounding of float32
    ranking = coar.rank_components(attributions, target=[0, 1], reference=[2, 3, 4])
    assert ranking.direction == "raise"
    assert ranking.ids == (6, 1, 2, 3, 4, 5, 0)
    np.testing.assert_array_equal(ranking.scores, scores[list(ranking.ids)])
    lower = coar.rank_components(attributions, [0, 1], [2, 3, 4], "lower")
    assert lower.ids == (0, 5, 2, 3, 4, 1, 6)
    assert ranking.target == (0, 1)
    assert ranking.reference == (2, 3, 4)
    np.testing.assert_array_equal(ranking.target_weights, WEIGHTS[:2].mean(axis=0)[list(ranking.ids)])
    np.testing.assert_array_equal(ranking.reference_weights, WEIGHTS[2:].mean(axis=0)[list(ranking.ids)])


def test_the_edit_and_its_predictions(attributions: coar.Attributions) -> None:
    edit = coar.coar_edit(attributions, target=[0, 1], reference=[2, 3, 4], k=3)
    assert edit.selection.ids == (1, 2, 6)
    assert edit.selection.index == attributions.index
    assert (edit.operation.name, edit.alpha, edit.method) == ("ablate", 1.0, "COAR-Edit")
    assert edit.base == attributions.header["identity"]["of"]["model"]
    details = dict(edit.details)
    assert details.pop("scores") == coar.rank_components(attributions, [0, 1], [2, 3, 4]).scores[:3].tolist()
    assert details == {
        "direction": "raise",
        "k": 3,
        "statistic": "t",
        "ids_in_order": [6, 1, 2],
        "target": [0, 1],
        "reference": [2, 3, 4],
        "predicted_change_target": 2.0,  # of -3, 0 and 1
        "predicted_change_reference": -4.0,  # of 2, 0 and 2: the harm
    }


def test_predicted_changes_are_what_the_attributions_predict(fitted: coar.Attributions) -> None:
    target, reference = [0, 4, 7], [1, 2, 3, 9]
    edit = coar.coar_edit(fitted, target, reference, k=5, direction="lower")
    keep = np.stack([np.ones(12, dtype=np.bool_), edit.selection.keep()])
    before, after = fitted.predict(keep)
    change = (after - before).astype(np.float64)
    np.testing.assert_allclose(edit.details["predicted_change_target"], change[target].mean(), rtol=1e-5)
    np.testing.assert_allclose(edit.details["predicted_change_reference"], change[reference].mean(), rtol=1e-5)
    assert edit.details["predicted_change_target"] < edit.details["predicted_change_reference"]


@pytest.mark.parametrize("k", [1, 12])
def test_every_k_up_to_all_components(fitted: coar.Attributions, k: int) -> None:
    assert len(coar.coar_edit(fitted, [0], [1], k=k).selection) == k


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0, expected an integer from 1 to 7, the number of components."),
        ({"k": -1}, "k is -1, expected an integer from 1 to 7, the number of components."),
        ({"k": 8}, "k is 8, expected an integer from 1 to 7, the number of components."),
        *(
            ({"k": k}, f"k is {k!r}, expected an integer from 1 to 7, the number of components.")
            for k in (1.5, 2.0, "2", None, True)
        ),
        ({"target": []}, "The target set is empty: give the positions of at least one example."),
        ({"reference": []}, "The reference set is empty: give the positions of at least one example."),
        ({"target": [0, 5]}, "The target set has no example 5: positions are 0 to 4."),
        ({"reference": [-1]}, "The reference set has no example -1: positions are 0 to 4."),
        ({"target": [0, 1, 0]}, "The target set names an example twice."),
        (
            {"target": [0, 1, 3], "reference": [3, 2, 1]},
            "Examples [1, 3] are in target and reference: each example can be in one only.",
        ),
        ({"direction": "up"}, "direction is 'up', expected 'raise' or 'lower'."),
        (
            {"target": [True, False, True, False, False]},
            "The target set holds True, expected positions: integers. For a mask, pass numpy.flatnonzero(mask); for "
            "ids, attributions.locate(ids).",
        ),
        (
            {"reference": np.array([True, False])},
            "The reference set holds np.True_, expected positions: integers. For a mask, pass "
            "numpy.flatnonzero(mask); for ids, attributions.locate(ids).",
        ),
        (
            {"target": ["e0"]},
            "The target set holds 'e0', expected positions: integers. For a mask, pass numpy.flatnonzero(mask); for "
            "ids, attributions.locate(ids).",
        ),
    ],
)
def test_refuses(attributions: coar.Attributions, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(coar.EditError) as refused:
        coar.coar_edit(attributions, **{"target": [0, 1], "reference": [2, 3, 4], "k": 2, **arguments})
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("target", "reference", "message"),
    [
        ([[1.0, np.nan]], [[0.0, 0.0]], "The attribution of target example 0, component 1 is not finite."),
        ([[1.0]], [[0.0], [np.inf]], "The attribution of reference example 1, component 0 is not finite."),
        ([[1.0]], [[0.0, 1.0]], "Target has 1 components, reference 2: they belong to different models."),
        (
            np.zeros((0, 2)),
            [[0.0, 1.0]],
            "The target set has shape (0, 2), expected (examples, components) with at least one example.",
        ),
        (
            [[1.0]],
            [0.0],
            "The reference set has shape (1,), expected (examples, components) with at least one example.",
        ),
    ],
)
def test_scores_refuse(target: Any, reference: Any, message: str) -> None:
    with pytest.raises(coar.EditError) as refused:
        coar.coar_scores(target, reference)
    assert str(refused.value) == message


def test_positions_may_be_an_array(attributions: coar.Attributions) -> None:
    found: Any = coar.coar_edit(attributions, np.array([0, 1]), np.array([2, 3, 4]), k=3)
    assert found == coar.coar_edit(attributions, [0, 1], [2, 3, 4], k=3)


def _accuracies(model: nn.Module, index: ComponentIndex, ids: tuple[int, ...], examples: Examples) -> Any:
    edited = coar.Edit(index.select(ids)).apply(model) if ids else model
    with torch.no_grad():
        correct = edited(examples.inputs()).argmax(1) == examples.targets
    return coar.group_accuracy(correct.numpy(), examples.groups)


def test_sweep_is_the_accuracy_of_each_edit(
    tiny_fit: coar.Attributions, tiny_net: nn.Module, tiny_examples: Examples, untouched: Any
) -> None:
    ranking = coar.rank_components(tiny_fit, [0, 3, 6], [1, 2, 4, 5], "lower")
    sizes = [0, 1, 3, 10]
    with untouched(tiny_net):
        found = coar.sweep_edit_size(ranking, Engine(tiny_net, tiny_fit.index), tiny_examples, sizes)
    assert found["k"].tolist() == sizes
    for row, k in enumerate(sizes):
        expected = _accuracies(tiny_net, tiny_fit.index, ranking.ids[:k], tiny_examples)
        for name in ("worst", "worst_group", "average", "group_average"):
            assert found[name][row] == getattr(expected, name)


def test_sweep_refuses(tiny_fit: coar.Attributions, tiny_net: nn.Module, tiny_examples: Examples) -> None:
    ranking = coar.rank_components(tiny_fit, [0], [1])
    engine = Engine(tiny_net, tiny_fit.index)
    for k in (-1, 11, 0.5, True):
        with pytest.raises(coar.EditError) as refused:
            coar.sweep_edit_size(ranking, engine, tiny_examples, [0, k])  # type: ignore[list-item]  # a wrong one
        assert str(refused.value) == f"k is {k}, expected an integer from 0 to 10, the number of components."
    with pytest.raises(coar.EditError) as refused:
        coar.sweep_edit_size(ranking, Engine(tiny_net, tiny_fit.index, "loss"), tiny_examples, [1])
    assert str(refused.value) == "The engine's output is 'loss', expected 'margin': accuracy is margin > 0."
    other = ablate.ComponentIndex.from_model(tiny_net, exclude=["3"])
    with pytest.raises(coar.EditError) as refused:
        coar.sweep_edit_size(ranking, Engine(tiny_net, other), tiny_examples, [1])
    assert str(refused.value) == (f"The engine has index {other.hash[:12]}, the ranking {tiny_fit.index.hash[:12]}.")


def test_finding_an_edit_touches_nothing(tiny_fit: coar.Attributions, tiny_net: nn.Module, untouched: Any) -> None:
    with untouched(tiny_net):
        coar.coar_edit(tiny_fit, [0, 1], [2, 3], k=2)
        with pytest.raises(coar.EditError, match="k is 99"):
            coar.coar_edit(tiny_fit, [0, 1], [2, 3], k=99)
