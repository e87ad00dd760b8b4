"""Edit success and drawdown: the lecture's three cases, and every variant under its own name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, drawdown, edit_success

# Two inputs in scope, both to become class 1; two out of scope, of classes 2 and 3, right before.
ASKED, ORDINARY = [1, 1], [2, 3]


@pytest.mark.parametrize(
    ("in_scope", "out_of_scope", "success", "down"),
    [
        ([0, 0], [2, 3], 0.0, 0.0),  # does nothing
        ([1, 0], [2, 3], 0.5, 0.0),  # memorises the edited example
        ([1, 1], [1, 1], 1.0, 1.0),  # says 1 to everything
        ([1, 1], [2, 3], 1.0, 0.0),  # as it should be
    ],
)
def test_the_cases_of_the_lecture(in_scope: list[int], out_of_scope: list[int], success: float, down: float) -> None:
    assert edit_success({"g": ([in_scope], ASKED)}).value == success
    found = drawdown([out_of_scope], ORDINARY, ORDINARY)
    assert (found.accuracy_drop, found.disagreement, found.error_rise) == (down, down, down)


def test_success_is_averaged_over_edits() -> None:
    found = edit_success({"pair": ([[1, 0], [1, 1]], ASKED), "four": ([[5, 5, 5, 0]], [5, 5, 5, 5])})
    assert found.per_edit.tolist() == [0.5, 1.0, 0.75]
    assert found.value == 0.75
    assert (found.right, found.predictions) == (6, 8)
    assert found.protocol == (
        "Edit success: 6 of 8 predictions of inputs in scope (the edited example included) are as asked; accuracy per "
        "edit, then mean over 3 edits. A model that is not edited scores 0 only if it has all inputs in scope wrong."
    )
    assert found.row()["value"] == 0.75


def test_variants_differ_where_the_base_is_not_right() -> None:
    """An edit that corrects an ordinary error helps accuracy, and disagrees."""
    found = drawdown([[2, 3]], [2, 0], ORDINARY)
    assert (found.accuracy_drop, found.disagreement, found.error_rise) == (-0.5, 0.5, -0.5)
    assert (found.base_right, found.right, found.disagreeing, found.predictions) == (1, 2, 1, 2)
    assert found.protocol == (
        "Drawdown on 2 inputs out of scope, mean over 1 edits, positive = worse. Accuracy drop: 1 of 2 right before, 2 "
        "of 2 predictions right after. Disagreement: 1 of 2 predictions are not the unedited model's. Error rise: mean "
        "error rate after minus before."
    )
    assert found.row()["metric"] == "drawdown (accuracy drop)"


@given(st.data())
def test_error_rise_is_the_accuracy_drop_seen_from_the_other_side(data: st.DataObject) -> None:
    n, edits = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    found = drawdown([data.draw(numbers) for _ in range(edits)], data.draw(numbers), data.draw(numbers))
    assert found.error_rise == pytest.approx(found.accuracy_drop)
    assert found.accuracy_drop <= found.disagreement + 1e-12
    assert found.per_edit.mean() == pytest.approx(found.accuracy_drop)


def test_no_inputs_out_of_scope_is_undefined() -> None:
    found = drawdown(np.zeros((1, 0), dtype=np.int64), [], [])
    assert np.isnan([found.accuracy_drop, found.disagreement, found.error_rise]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edit_success({}), "There are no edits. Give the predictions of at least one edit."),
        (
            lambda: edit_success({"g": (np.zeros((0, 2), dtype=np.int64), ASKED)}),
            "Group 'g' has no edit or no input in scope. Leave it out.",
        ),
        (
            lambda: drawdown(np.zeros((0, 2), dtype=np.int64), ORDINARY, ORDINARY),
            "There are no edits. Give the predictions of at least one edit.",
        ),
        (
            lambda: drawdown([[1, 2]], [1, 2, 3], [1, 2]),
            "Base predictions are int64 of shape (3,), expected integers of shape (2,): one class number each.",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
