"""Accuracy per group against counting by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import coar


def test_group_accuracy() -> None:
    found = coar.group_accuracy([True, False, True, True, False, False], ["b", "b", "a", "b", "c", "c"])
    assert found.groups == {"a": 1.0, "b": pytest.approx(2 / 3), "c": 0.0}
    assert list(found.groups) == ["a", "b", "c"]
    assert found.sizes == {"a": 1, "b": 3, "c": 2}
    assert (found.worst, found.worst_group, found.average) == (0.0, "c", 0.5)
    assert found.group_average == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_the_first_of_equally_bad_groups_is_the_worst() -> None:
    assert coar.group_accuracy([False, False, True], ["z", "m", "a"]).worst_group == "m"


def test_one_group_and_arrays() -> None:
    found = coar.group_accuracy(np.array([True, True]), ("a", "a"))
    assert (found.worst, found.average, found.group_average, found.worst_group) == (1.0, 1.0, 1.0, "a")


@pytest.mark.parametrize(
    ("correct", "groups", "message"),
    [
        ([True], ["a", "b"], "correct is bool of shape (1,), expected bool (2,), not empty."),
        ([1, 0], ["a", "b"], "correct is int64 of shape (2,), expected bool (2,), not empty."),
        (np.zeros(0, dtype=np.bool_), [], "correct is bool of shape (0,), expected bool (0,), not empty."),
    ],
)
def test_group_accuracy_refuses(correct: Any, groups: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="expected bool") as refused:
        coar.group_accuracy(correct, groups)
    assert str(refused.value) == message
