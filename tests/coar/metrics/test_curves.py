"""Interpolation curves: concavity against shapes known by formula, the two rules for alpha, and the ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import Accuracy, InterpolationCurve, MetricError, is_concave, is_convex, second_differences

GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


def _curve(original: list[int], edited: list[int], n: int = 1000, alphas: list[float] = GRID) -> InterpolationCurve:
    columns = {"original": original, "edited": edited}
    return InterpolationCurve.of(alphas, {name: [Accuracy(v, n) for v in values] for name, values in columns.items()})


CURVE = _curve([900, 899, 890, 850, 700], [100, 400, 600, 700, 720])


def test_table_and_values() -> None:
    table = CURVE.table()
    assert table["alpha"].tolist() == GRID
    assert table["original_right"].tolist() == [900, 899, 890, 850, 700]
    assert table["edited"].tolist() == [0.1, 0.4, 0.6, 0.7, 0.72]
    assert CURVE.values("edited").tolist() == [0.1, 0.4, 0.6, 0.7, 0.72]
    assert CURVE.protocol == (
        "Accuracy at 5 strengths alpha from 0 (the original model) to 1 (1 is the full edit): original on 1,000 "
        "examples, edited on 1,000 examples; micro-average over examples."
    )


def test_the_mean_rule() -> None:
    """Means .5, .6495, .745, .775, .71."""
    found = CURVE.choose("mean")
    assert (found.alpha, found.position, found.edited.right, found.original.right) == (0.75, 3, 700, 850)


def test_the_cap_rule() -> None:
    """Drops 0, .1, 1, 5 and 20 percentage points."""
    assert CURVE.choose("cap").alpha == 0.25
    assert CURVE.choose("cap", cap=1.0).alpha == 0.5
    assert CURVE.choose("cap", cap=0.0).alpha == 0.0
    assert CURVE.choose("cap", cap=100.0).alpha == 1.0
    assert CURVE.choose("cap").protocol == (
        "alpha = 0.25 has the largest edited accuracy where the original drops by at most 0.25 percentage points, of 2 "
        "admissible among 5 strengths; of equal ones the smaller; to be chosen on validation examples."
    )


def test_of_equal_ones_the_smaller_alpha() -> None:
    assert _curve([500] * 5, [300, 700, 700, 700, 100]).choose("mean").alpha == 0.25
    assert _curve([500] * 5, [700] * 5).choose("cap").alpha == 0.0
    assert _curve([600, 500, 400, 300, 200], [200, 300, 400, 500, 600]).choose("mean").alpha == 0.0


def test_an_edit_that_only_harms_is_not_chosen() -> None:
    assert _curve([900, 700, 500, 300, 100], [300, 200, 100, 50, 0]).choose("cap").alpha == 0.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 100))
def test_rules_choose_the_best_there_is(points: list[tuple[int, int]], cap: int) -> None:
    alphas = np.linspace(0, 1, len(points)).tolist()
    curve = _curve([o for o, _ in points], [e for _, e in points], 50, alphas)
    mean = curve.choose("mean")
    assert sum(points[mean.position]) == max(sum(point) for point in points)
    capped = curve.choose("cap", cap=float(cap))
    allowed = [e for o, e in points if 2 * (points[0][0] - o) <= cap]
    assert points[capped.position][1] == max(allowed)


def test_second_differences_of_a_parabola() -> None:
    """On any grid the second difference of a x² is 2 a; of a line 0."""
    alphas = [0.0, 0.1, 0.4, 0.5, 1.0]
    values = [-3 * a * a + a for a in alphas]
    assert second_differences(alphas, values) == pytest.approx([-6, -6, -6])
    assert second_differences(alphas, [2 * a for a in alphas]) == pytest.approx([0, 0, 0], abs=1e-12)
    assert is_concave(alphas, values)
    assert not is_convex(alphas, values)
    assert is_convex(alphas, [a**2 for a in alphas])
    assert is_concave(alphas, [0.3 * a for a in alphas])
    assert is_convex(alphas, [0.3 * a for a in alphas])
    assert second_differences([0.0, 1.0], [0.0, 1.0]).size == 0


def test_the_loss_along_the_last_linear_layer_is_convex() -> None:
    """Cross-entropy is convex in the logits, and these are linear in alpha."""
    generator = np.random.default_rng(3)
    x, labels = generator.normal(size=(40, 6)), generator.integers(0, 4, 40)
    before, after = generator.normal(size=(2, 6, 4)) * 2
    alphas = np.linspace(0, 1, 21)
    losses = []
    for alpha in alphas:
        logits = x @ ((1 - alpha) * before + alpha * after)
        logits = logits - logits.max(axis=1, keepdims=True)
        losses.append(float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(40), labels]).mean()))
    assert is_convex(alphas.tolist(), losses)
    assert np.ptp(losses) > 0.1
    assert not is_concave(alphas.tolist(), losses)


@pytest.mark.parametrize(
    ("original", "edited", "share"),
    [
        ([900, 880, 850, 800, 700], [100, 400, 600, 700, 720], 1.0),  # bends outwards
        ([900, 750, 710, 705, 700], [100, 110, 150, 300, 720], 0.0),  # bends inwards
        ([900, 850, 800, 750, 700], [100, 200, 300, 400, 500], 1.0),  # straight
        ([900, 880, 710, 705, 700], [100, 400, 150, 300, 720], 1 / 3),
        ([500, 600, 700, 800, 900], [100, 400, 500, 600, 700], 1.0),  # both rise: above is up
        ([900, 800, 900, 950, 900], [100, 200, 300, 400, 500], 2 / 3),  # no cost in the end: right of the vertical
    ],
)
def test_the_share_above_the_chord(original: list[int], edited: list[int], share: float) -> None:
    assert _curve(original, edited).share_above_chord() == pytest.approx(share)


def test_where_there_is_no_chord_the_share_is_not_defined() -> None:
    assert np.isnan(_curve([900, 800], [0, 1], alphas=[0.0, 1.0]).share_above_chord())
    assert np.isnan(_curve([900, 1, 2, 3, 900], [5, 1, 2, 3, 5]).share_above_chord())


def test_concavity_of_a_column() -> None:
    assert (CURVE.second_differences("edited") <= 1e-9).all()
    assert is_concave(CURVE.alphas, CURVE.values("original"))


def test_the_ends_are_the_two_models() -> None:
    CURVE.check_ends(
        {"original": Accuracy(900, 1000)}, {"original": Accuracy(700, 1000), "edited": Accuracy(720, 1000)}
    )
    with pytest.raises(MetricError) as refused:
        CURVE.check_ends({"original": Accuracy(900, 1000)}, {"original": Accuracy(701, 1000)})
    assert str(refused.value) == (
        "At alpha = 1 the curve has 700 of 1000 right in 'original', the model judged directly 701 of 1000: the path "
        "does not end in that model."
    )
    half = _curve([900, 800], [0, 1], alphas=[0.0, 0.5])
    half.check_ends({}, {"original": Accuracy(1, 1000)})  # the curve does not reach the edited model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _curve([1, 2], [1, 2], alphas=[0.5, 1.0]),
            "alphas are (0.5, 1.0), expected rising numbers that start at 0, the original model.",
        ),
        (
            lambda: _curve([1, 2], [1, 2], alphas=[0.0, 0.0]),
            "alphas are (0.0, 0.0), expected rising numbers that start at 0, the original model.",
        ),
        (
            lambda: InterpolationCurve.of([0.0], {"original": [Accuracy(1, 2)]}),
            "There is no column 'edited', only 'original'. Give it.",
        ),
        (
            lambda: InterpolationCurve.of([0.0], {"original": [Accuracy(1, 2)], "edited": []}),
            "Column 'edited' has 0 accuracies on [] examples, expected 1 (one per alpha) on the same examples.",
        ),
        (
            lambda: InterpolationCurve.of(
                [0.0, 1.0],
                {"original": [Accuracy(1, 2), Accuracy(1, 3)], "edited": [Accuracy(1, 2), Accuracy(1, 2)]},
            ),
            "Column 'original' has 2 accuracies on [2, 3] examples, expected 2 (one per alpha) on the same examples.",
        ),
        (lambda: CURVE.values("fog"), "There is no column 'fog'. Known: 'original', 'edited'."),
        (lambda: CURVE.choose("best"), "rule is 'best', expected 'mean' or 'cap'."),  # type: ignore[arg-type]
        (
            lambda: second_differences([0.0, 1.0], [1.0]),
            "alphas have shape (2,) and values (1,), expected rising alphas (n,) and one value each.",
        ),
    ],
)
def test_what_is_no_curve_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
