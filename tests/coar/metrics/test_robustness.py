"""Effective robustness: the specification's line, its range, clipping, and the gap to a curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, effective_robustness, fit_baseline, vertical_gap


def test_the_line_through_two_models() -> None:
    found = fit_baseline([0.6, 0.8], [0.3, 0.5])
    assert found.slope == pytest.approx(0.86386, abs=5e-6)
    assert found.intercept == pytest.approx(-1.19756, abs=5e-6)
    assert found.expected(0.7) == pytest.approx(0.38565, abs=5e-6)
    assert (found.low, found.high, found.models) == (0.6, 0.8, 2)
    assert found.protocol == (
        "Baseline: logit(OOD accuracy) = 0.8639 logit(ID accuracy) + -1.198, least squares through 2 models with ID "
        "accuracy 0.6 to 0.8."
    )


def test_more_robust_is_positive() -> None:
    baseline = fit_baseline([0.6, 0.8], [0.3, 0.5])
    found = effective_robustness(0.7, 0.45, baseline)
    assert found.value == pytest.approx(0.45 - 0.38565, abs=1e-5)
    assert effective_robustness(0.7, 0.3, baseline).value < 0
    assert effective_robustness(0.6, 0.3, baseline).value == pytest.approx(0)
    assert found.protocol.startswith("Effective robustness: OOD accuracy 0.45 minus 0.3857, what the baseline has at")


@given(st.floats(-3, 3), st.floats(-2, 2))
def test_a_line_in_logits_is_found_again(slope: float, intercept: float) -> None:
    x = np.array([0.2, 0.4, 0.5, 0.7, 0.9])
    y = 1 / (1 + np.exp(-(slope * np.log(x / (1 - x)) + intercept)))
    found = fit_baseline(x, y)
    assert found.slope == pytest.approx(slope, abs=1e-6)
    assert found.intercept == pytest.approx(intercept, abs=1e-6)
    assert found.expected(0.4) == pytest.approx(y[1])


def test_accuracies_of_0_and_1_are_clipped_by_the_number_of_examples() -> None:
    """1 of 10 and 10 of 10 ordinary, 0 and 5 of 20 shifted: 1 becomes 0.95, 0 becomes 0.025."""
    found = fit_baseline([0.1, 1.0], [0.0, 0.25], examples=(10, 20))
    same = fit_baseline([0.1, 0.95], [0.025, 0.25])
    assert found.slope == pytest.approx(same.slope)
    assert found.intercept == pytest.approx(same.intercept)
    assert found.expected(1.0) == pytest.approx(0.25)
    assert "clipped to [1/2n, 1 - 1/2n] with n = 10 and 20" in found.protocol


def test_the_gap_to_a_curve() -> None:
    found = vertical_gap(0.7, 0.5, [0.8, 0.6], [0.5, 0.3])
    assert found.expected == pytest.approx(0.4)
    assert found.value == pytest.approx(0.1)
    assert vertical_gap(0.6, 0.5, [0.6, 0.6, 0.8], [0.2, 0.4, 0.5]).expected == pytest.approx(0.3)
    assert vertical_gap(0.0, 0.5, [0.0, 1.0], [0.0, 1.0]).value == 0.5
    assert found.protocol.endswith("positive = more robust; no fit in logits.")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit_baseline([0.6, 0.8], [0.3, 0.5]).expected(0.81),
            "ID accuracy 0.81 is outside the baseline's range, 0.6 to 0.8: what robustness is to be expected there is "
            "not "
            "known. Add baseline models of such accuracy.",
        ),
        (
            lambda: vertical_gap(0.5, 0.5, [0.6, 0.8], [0.3, 0.5]),
            "ID accuracy 0.5 is outside the baseline's range, 0.6 to 0.8: what robustness is to be expected there is "
            "not "
            "known. Add baseline models of such accuracy.",
        ),
        (
            lambda: fit_baseline([0.6, 0.6], [0.3, 0.5]),
            "A baseline needs at least 2 models of different ID accuracy, got 1. Add models, e.g. the points of a "
            "fine-tuning path.",
        ),
        (
            lambda: fit_baseline([0.6, 0.8], [0.0, 0.5]),
            "An OOD accuracy is 0 or 1, which has no logit. Give examples=(ordinary, shifted), how many examples the "
            "accuracies were counted on; they are then clipped to [1/2n, 1 - 1/2n].",
        ),
        (
            lambda: fit_baseline([0.6, 0.8], [0.5]),
            "There are 2 ID accuracies and 1 OOD accuracies. Give both of each model.",
        ),
        (
            lambda: fit_baseline([60.0, 80.0], [30.0, 50.0]),
            "ID accuracies hold 60 at position 0, expected accuracies between 0 and 1, not percent.",
        ),
        (
            lambda: effective_robustness(0.7, float("nan"), fit_baseline([0.6, 0.8], [0.3, 0.5])),
            "Accuracies hold nan at position 1, expected accuracies between 0 and 1, not percent.",
        ),
        (
            lambda: fit_baseline([[0.6]], [[0.5]]),
            "ID accuracies have shape (1, 1), expected (n,): one accuracy per model.",
        ),
        (
            lambda: fit_baseline([0.6, 0.8], [0.3, 0.5], examples=(0, 5)),
            "examples has 0 for ID, expected how many examples there are: at least 1.",
        ),
    ],
)
def test_what_is_not_known_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
