"""The Pareto front against its definition, and the hypervolume against counting cells of a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, OperatingPoint, TradeoffCurve, hypervolume, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12)


def _literal_front(points: list[tuple[int, int]]) -> set[tuple[int, int]]:
    def beats(q: tuple[int, int], p: tuple[int, int]) -> bool:
        return q[0] >= p[0] and q[1] >= p[1] and q != p

    return {p for p in points if not any(beats(q, p) for q in points)}


def test_a_front_by_hand() -> None:
    points = [(1.0, 0.0), (0.9, 0.5), (0.9, 0.4), (0.5, 0.5), (0.2, 0.8), (0.2, 0.8)]
    assert pareto_front(points).tolist() == [4, 1, 0]  # by rising locality; of equal points the first
    assert pareto_front([]).tolist() == []


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points).tolist()
    found = [points[i] for i in front]
    assert set(found) == _literal_front(points)
    assert len(found) == len(set(found))
    assert found == sorted(found)
    assert all(points.index(points[i]) == i for i in front)


@given(POINTS)
def test_the_hypervolume_counts_dominated_cells(points: list[tuple[int, int]]) -> None:
    cells = sum(any(x > i and y > j for x, y in points) for i in range(8) for j in range(8))
    assert hypervolume(points) == cells


@given(POINTS, st.tuples(st.integers(0, 8), st.integers(0, 8)))
def test_another_point_never_takes_area_away(points: list[tuple[int, int]], more: tuple[int, int]) -> None:
    assert hypervolume([*points, more]) >= hypervolume(points)


def test_no_edit_and_a_perfect_one() -> None:
    assert hypervolume([(1.0, 0.0)]) == 0
    assert hypervolume([(1.0, 1.0)]) == 1
    assert hypervolume([(1.0, 0.5), (0.5, 1.0)]) == 0.75
    assert hypervolume([(0.5, -0.2), (-0.1, 0.9)]) == 0  # the published code's generalisation may be negative


def test_a_curve_of_named_points() -> None:
    points = [
        OperatingPoint("0.05", 0.99, 0.3, 1.0, "masks"),
        OperatingPoint("0.5", 0.9, 0.6, 1.0, "masks"),
        OperatingPoint("1", 0.8, 0.5, 1.0, "masks"),
        OperatingPoint("undefined", 0.8, float("nan")),
    ]
    found = TradeoffCurve.of(points)
    assert (found.front, found.undefined) == ((1, 0), (3,))
    assert found.hypervolume == pytest.approx(0.9 * 0.6 + 0.09 * 0.3)
    assert found.table()["on_front"].tolist() == [True, True, False, False]
    assert found.table()["success"].tolist()[:3] == [1.0, 1.0, 1.0]
    assert found.protocol == (
        "Generalisation rate (y) against locality rate (x, agreement with the unedited model), one point per setting: "
        "4 points, 2 on the Pareto front; hypervolume 0.567 with respect to (0, 0), 1 is best. Read the success rate "
        "beside it: no edit at all is at locality 1. 1 points without a rate are left out."
    )


@pytest.mark.parametrize("plane", [[(np.nan, 1.0)], [(1.0, np.nan)], [(np.nan, np.nan), (0.5, 0.5)]])
def test_points_that_are_not_defined_beat_nothing(plane: list[tuple[float, float]]) -> None:
    assert pareto_front(plane).tolist() == [i for i, point in enumerate(plane) if point == (0.5, 0.5)]
    assert hypervolume(plane) == (0.25 if (0.5, 0.5) in plane else 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TradeoffCurve.of([]), "There are no operating points. Give at least one."),
        (
            lambda: pareto_front([1.0, 2.0]),
            "Points have shape (2,), expected (n, 2): (locality, generalisation) each.",
        ),
    ],
)
def test_what_is_no_set_of_points_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
