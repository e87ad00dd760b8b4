"""Out-of-distribution penalties: the specification's numbers, signs, and how many cells a mean is over."""

from __future__ import annotations

from typing import Any

import pytest

from coar.metrics import Accuracy, MetricError, editing_task_penalty, original_task_penalty


def test_the_original_task() -> None:
    found = original_task_penalty({"fog 1": Accuracy(50, 100)}, {"fog 1": Accuracy(46, 100)})
    assert found.value == -0.04
    assert (found.task, found.complete) == ("original", True)
    assert found.protocol == (
        "Original-task OOD penalty (Equation 6): accuracy of the edited model minus accuracy of the unedited model, "
        "both on the same shifted original data; mean over 1 of 1 cells, each counted once; negative = worse."
    )


def test_the_editing_task() -> None:
    found = editing_task_penalty(Accuracy(80, 100), {"fog 1": Accuracy(65, 100)})
    assert found.value == -0.15
    assert found.task == "editing"
    assert "minus its own accuracy on editing data without shift" in found.protocol


def test_without_an_edit_only_the_first_is_0() -> None:
    shifted = {"fog 1": Accuracy(65, 100), "snow 1": Accuracy(40, 100)}
    assert original_task_penalty(shifted, shifted).value == 0
    assert editing_task_penalty(Accuracy(80, 100), shifted).value == pytest.approx(-0.275)


def test_cells_count_once_and_missing_ones_are_said() -> None:
    base = {"fog 1": Accuracy(50, 100), "snow 1": Accuracy(5, 10)}
    edited = {"snow 1": Accuracy(7, 10), "fog 1": Accuracy(40, 100)}
    found = original_task_penalty(base, edited, expected=95)
    assert found.value == pytest.approx(0.05)
    assert found.cells == {"fog 1": -0.1, "snow 1": 0.2}
    assert not found.complete
    assert found.protocol.endswith(
        "mean over 2 of 95 cells, each counted once; negative = worse. 93 cells are missing: not comparable with full "
        "means."
    )
    table = found.table()
    assert table["cell"].tolist() == ["fog 1", "snow 1"]
    assert table["penalty"].tolist() == [-0.1, 0.2]
    assert table["subtracted_right"].tolist() == [50, 5]
    assert table["shifted_examples"].tolist() == [100, 10]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: original_task_penalty({"fog 1": Accuracy(1, 2)}, {"snow 1": Accuracy(1, 2)}),
            "Cell 'fog 1' is there for one model only. Judge both models on the same cells.",
        ),
        (
            lambda: original_task_penalty({"fog 1": Accuracy(1, 2)}, {"fog 1": Accuracy(1, 3)}),
            "Cell 'fog 1' has 2 examples for the unedited model and 3 for the edited one. Use the same ones.",
        ),
        (lambda: original_task_penalty({}, {}), "There are no shifted data sets. Give at least one cell."),
        (
            lambda: editing_task_penalty(Accuracy(1, 2), {"a": Accuracy(1, 2), "b": Accuracy(1, 2)}, expected=1),
            "There are 2 cells but expected=1. Give the benchmark's number of cells.",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
