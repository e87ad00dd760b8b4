"""Early stopping: the specification's series, and the patience that ends one whose best is 0."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, StopRule, early_stop


def test_the_series_of_the_specification() -> None:
    found = early_stop([0.2, 0.5, 0.6, 0.31, 0.29, 0.9])
    assert (found.index, found.best, found.best_index, found.stopped, found.reason) == (4, 0.6, 2, True, "fell")


def test_half_of_the_best_is_not_below_it() -> None:
    assert not early_stop([0.5, 0.25]).stopped
    assert early_stop([0.5, 0.25, 0.24999]).index == 2


def test_a_best_of_0_stops_by_patience_only() -> None:
    assert not early_stop([0.0] * 100).stopped
    found = early_stop([0.0] * 100, patience=10)
    assert (found.index, found.best, found.best_index, found.reason) == (10, 0.0, 0, "patience")


def test_patience_counts_from_the_best() -> None:
    found = early_stop([0.5, 0.6, 0.6, 0.55, 0.59, 0.7], patience=3)
    assert (found.index, found.best_index) == (4, 1)
    assert early_stop([0.5, 0.6, 0.6, 0.61, 0.59, 0.7], patience=3).best == 0.7
    assert "falls below 0.5 x the best so far or is not above it for 3 scores in a row" in found.protocol


def test_a_rule_says_when_it_has_seen_the_best() -> None:
    rule = StopRule(patience=2)
    newest = []
    for score in (0.1, 0.3, 0.2):
        assert not rule.see(score)
        newest.append(rule.best_index == rule.seen - 1)
    assert newest == [True, True, False]
    assert rule.see(0.3)
    assert (rule.best, rule.best_index, rule.reason) == (0.3, 1, "patience")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.one_of(st.none(), st.integers(1, 5)))
def test_the_best_is_the_best_up_to_the_stop(scores: list[float], patience: int | None) -> None:
    found = early_stop(scores, patience=patience)
    seen = scores[: found.index + 1]
    assert found.best == max(seen)
    assert found.best_index == seen.index(found.best)
    assert found.stopped or found.index == len(scores) - 1
    if found.reason == "fell":
        assert seen[-1] < 0.5 * found.best


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: early_stop([]), "There are no scores. Give at least one."),
        (
            lambda: early_stop([0.1, float("nan")]),
            "Score 1 is nan, expected a finite number from 0 up, e.g. an accuracy.",
        ),
        (lambda: StopRule(fall=2), "fall is 2, expected a share of the best score between 0 and 1."),
        (lambda: StopRule(patience=0), "patience is 0, expected at least 1 score, or None."),
    ],
)
def test_what_is_no_rule_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
