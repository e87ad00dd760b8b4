"""Success, generalisation and locality against counting by hand, and the published code's versions under their
names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, drawdown, generalisation_rate, locality_rate, success_rate

Groups = dict[str, tuple[Any, Any]]


def _one_edit_right_on(n: int, right: int, itself: bool) -> tuple[Any, Any]:
    """Predictions of n edits: right on so many others, and on the edited example itself or not. The label is 1."""
    predictions = np.zeros((n, n), dtype=np.int64)
    for e in range(n):
        others = [x for x in range(n) if x != e]
        predictions[e, others[:right]] = 1
        predictions[e, e] = int(itself)
    return predictions, np.ones(n, dtype=np.int64)


def test_success_is_a_share_of_edits() -> None:
    found = success_rate([3, 1, 2, 2], [3, 1, 2, 0], base=[0, 1, 0, 1])
    assert (found.value, found.successes, found.edits, found.already_right) == (0.75, 3, 4, 1)
    assert found.per_edit.tolist() == [True, True, True, False]
    assert found.protocol == (
        "Success rate: 3 of 4 edited examples are predicted as asked by the model that was edited for that one "
        "example, each edit from the unedited model; micro-average over edits. Before any edit 1 of them were right "
        "already."
    )
    low, high = found.interval()
    assert 0 <= low < 0.75 < high <= 1
    assert found.row()["count"] == 3


def test_three_images_by_hand() -> None:
    """Edit 0 corrects itself and image 1; edit 1 only itself; edit 2 nothing, not even itself: 1 of 6 others."""
    labels = np.array([7, 7, 7])
    predictions = np.array([[7, 7, 0], [0, 7, 0], [0, 0, 0]])
    found = generalisation_rate({"g": (predictions, labels)})
    assert found.value == pytest.approx(1 / 6)
    assert (found.right, found.predictions, found.undefined) == (1, 6, ())
    assert found.groups["g"].per_edit.tolist() == [0.5, 0.0, 0.0]
    # (2 - 1) / 3, (1 - 1) / 3, (0 - 1) / 3
    assert generalisation_rate({"g": (predictions, labels)}, version="code").value == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("itself", "version", "percent"),
    [(True, "equation", 62.5), (False, "equation", 62.5), (True, "code", 61.2), (False, "code", 59.2)],
)
def test_49_images_of_which_30_are_right(itself: bool, version: Any, percent: float) -> None:
    found = generalisation_rate({"g": _one_edit_right_on(49, 30, itself)}, version=version)
    assert round(100 * found.value, 1) == percent
    assert ("published code" in found.protocol) == (version == "code")
    assert ("published code" in found.row()["metric"]) == (version == "code")


@given(st.integers(2, 12), st.data())
def test_the_codes_version_is_the_equations_times_n_minus_1_over_n(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n - 1))
    equation = generalisation_rate({"g": _one_edit_right_on(n, right, True)}).value
    assert equation == pytest.approx(right / (n - 1))
    code = generalisation_rate({"g": _one_edit_right_on(n, right, True)}, version="code").value
    assert code == pytest.approx(equation * (n - 1) / n)
    failed = generalisation_rate({"g": _one_edit_right_on(n, right, False)}, version="code").value
    assert failed == pytest.approx(code - 1 / n)


def test_groups_count_once_whatever_their_size() -> None:
    found = generalisation_rate({"large": _one_edit_right_on(11, 10, True), "small": _one_edit_right_on(2, 0, True)})
    assert found.value == 0.5  # the micro-average would be 110 / 112
    assert (found.right, found.predictions) == (110, 112)


def test_a_group_of_one_is_undefined_named_and_left_out() -> None:
    alone = (np.array([[1]]), np.array([1]))
    found = generalisation_rate({"alone": alone, "pair": _one_edit_right_on(2, 1, True)})
    assert np.isnan(found.groups["alone"].value)
    assert found.undefined == ("alone",)
    assert found.value == 1.0
    assert found.protocol.endswith("macro-average over 1 groups. Without others, so left out: alone.")
    assert np.isnan(generalisation_rate({"alone": alone}).value)


def test_intervals_resample_groups_and_edits_where_there_is_one_group() -> None:
    one = generalisation_rate({"g": (np.array([[7, 7, 0], [0, 7, 0], [0, 0, 0]]), np.array([7, 7, 7]))})
    low, high = one.interval()
    assert 0 <= low <= one.value < high <= 0.5
    two = generalisation_rate({"a": _one_edit_right_on(4, 3, True), "b": _one_edit_right_on(4, 0, True)})
    assert two.interval() == (0.0, 1.0)


def test_an_edit_that_does_nothing() -> None:
    """On base errors: success 0, generalisation 0, locality 1."""
    labels, base = np.array([1, 1, 1]), np.array([0, 2, 0])
    matrix = np.tile(base, (3, 1))
    assert success_rate(np.diagonal(matrix), labels).value == 0
    assert generalisation_rate({"g": (matrix, labels)}).value == 0
    ordinary = np.array([3, 4, 5, 0])
    found = locality_rate(np.tile(ordinary, (3, 1)), ordinary, [3, 4, 5, 1])
    assert found.value == found.agreement == 1
    assert found.accuracy == found.base_accuracy == 0.75


def test_an_oracle_that_always_says_y() -> None:
    labels = np.full(5, 2)
    matrix = np.full((5, 5), 2)
    assert success_rate(np.diagonal(matrix), labels).value == 1
    assert generalisation_rate({"g": (matrix, labels)}).value == 1


def test_locality_is_agreement_and_accuracy_under_their_own_names() -> None:
    base, labels = [0, 1, 1], [0, 1, 2]
    found = locality_rate([[0, 1, 2], [0, 0, 1]], base, labels, groups=["a", "b"])
    assert (found.agreeing, found.right, found.predictions) == (4, 4, 6)
    assert found.agreement == found.accuracy == pytest.approx(4 / 6)
    assert found.base_accuracy == pytest.approx(2 / 3)
    different = locality_rate([[0, 1, 1]], base, labels)
    assert different.agreement == 1
    assert different.accuracy == pytest.approx(2 / 3)
    assert found.per_edit.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert [row["metric"] for row in found.rows()] == ["locality (agreement)", "locality (accuracy)"]
    assert found.protocol == (
        "Locality: 4 of 6 predictions (2 edits x 3 ordinary examples) are those of the unedited model (agreement), and "
        "4 are the label (accuracy; the unedited model has 2 of 3 right); micro-average over edits."
    )


def test_locality_counts_edits_the_published_code_groups() -> None:
    found = locality_rate([[0], [1], [1]], [0], [0], groups=["a", "b", "b"])
    assert found.agreement == pytest.approx(1 / 3)
    assert found.by_group == {"a": 1.0, "b": 0.0}
    assert found.group_average == 0.5
    assert np.isnan(locality_rate([[0]], [0], [0]).group_average)


def test_no_ordinary_examples_is_undefined() -> None:
    found = locality_rate(np.zeros((2, 0), dtype=np.int64), [], [])
    assert np.isnan([found.agreement, found.accuracy, found.base_accuracy]).all()
    assert found.predictions == 0
    assert np.isnan(found.interval()).all()


@given(st.data())
def test_locality_is_1_minus_drawdown_where_the_base_is_right(data: st.DataObject) -> None:
    edits, examples = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    numbers = st.lists(st.integers(0, 3), min_size=examples, max_size=examples)
    labels = data.draw(numbers)
    predictions = [data.draw(numbers) for _ in range(edits)]
    local, down = locality_rate(predictions, labels, labels), drawdown(predictions, labels, labels)
    assert local.agreement == local.accuracy
    for variant in (down.accuracy_drop, down.disagreement, down.error_rise):
        assert variant == pytest.approx(1 - local.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: success_rate([1.0, 2.0], [1, 2]),
            "Predictions are float64 of shape (2,), expected integers of shape (2,): one class number each.",
        ),
        (
            lambda: success_rate([True], [1]),
            "Predictions are bool of shape (1,), expected integers of shape (1,): one class number each.",
        ),
        (
            lambda: success_rate([1, 2], [1, -1]),
            "Labels hold -1, expected class numbers from 0 up. Leave such examples out.",
        ),
        (lambda: success_rate([], []), "There are no edits. Give the predictions of at least one edit."),
        (
            lambda: generalisation_rate({"g": ([[1, 2]], [1, 2])}),
            "Predictions of group 'g' are int64 of shape (1, 2), expected integers of shape (2, 2): one class "
            "number each.",
        ),
        (lambda: generalisation_rate({}), "There is no group. Give the predictions of at least one group."),
        (
            lambda: generalisation_rate({"g": ([[1]], [1])}, version="paper"),  # type: ignore[arg-type]
            "version is 'paper', expected 'equation' or 'code'.",
        ),
        (
            lambda: locality_rate([[1, 2], [1, 2]], [1, 2], [1, 2], groups=["a"]),
            "There are 1 groups for 2 edits. Give the group of each edit.",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
