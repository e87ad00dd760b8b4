"""Inputs as nested lists with labels beside them are numbers, row by row; never a data set of (input, target)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ablate import DataError, Examples

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize("rows", [ROWS, tuple(map(tuple, ROWS)), [torch.tensor(row) for row in ROWS]])
def test_rows_of_numbers(rows: Any) -> None:
    for examples in (Examples(rows, [0, 1]), Examples.of((rows, [0, 1])), Examples.of(list(rows), [0, 1])):
        assert torch.equal(examples.inputs(), torch.tensor(ROWS))
        assert examples.hash == Examples(torch.tensor(ROWS), [0, 1]).hash


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [3.0]], r"^Inputs cannot become a tensor: "),
        ([torch.zeros(2), torch.zeros(3)], r"^Inputs have different shapes, \[\(2,\), \(3,\)\]: make them one shape"),
    ],
)
def test_rows_that_do_not_fit(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Examples(rows, [0, 1])


def test_a_list_of_items_is_a_data_set() -> None:
    examples = Examples([(torch.zeros(2), 3), (torch.ones(2), 4)])  # type: ignore[arg-type]
    assert examples.targets.tolist() == [3, 4]
    assert torch.equal(examples.inputs(), torch.tensor([[0.0, 0], [1, 1]]))


def test_targets_given_beside_a_list_of_items_count() -> None:
    examples = Examples([(torch.zeros(2), 3), (torch.ones(2), 4)], [0, 1])  # type: ignore[arg-type]
    assert examples.targets.tolist() == [0, 1]
    assert torch.equal(examples.inputs(), torch.tensor([[0.0, 0], [1, 1]]))
