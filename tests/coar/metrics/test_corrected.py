"""Percent of errors corrected: the specification's numbers, the four cells, and the published code's two deviations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, errors_corrected, errors_corrected_cells, outcomes, percent_corrected

LABELS = [0, 0, 1, 1, 1]
CLEAN = [0, 1, 1, 1, 0]
PRE = [1, 1, 0, 0, 0]
POST = [0, 0, 1, 0, 1]
TRAIN = np.zeros(5, dtype=np.bool_)
HERE = "train style"


def test_counts_give_the_percent() -> None:
    assert percent_corrected(10, 4) == 60
    assert percent_corrected(10, 25) == -150
    assert percent_corrected(10, 25, clip=-100) == -100
    assert np.isnan(percent_corrected(0, 3))
    assert np.isnan(percent_corrected(0, 3, clip=-100))


def test_target_and_others_of_the_paper_and_of_the_published_code() -> None:
    paper = errors_corrected_cells(CLEAN, PRE, POST, LABELS, 0, TRAIN)
    code = errors_corrected_cells(CLEAN, PRE, POST, LABELS, 0, TRAIN, others="repository")
    assert paper.cells["target", HERE].percent == code.cells["target", HERE].percent == 100
    assert paper.cells["other", HERE].percent == 50
    assert code.cells["other", HERE].percent == 75
    assert [cell.examples for cell in paper.cells.values()] == [1, 0, 2, 0]
    assert [cell.examples for cell in code.cells.values()] == [1, 0, 4, 0]
    assert "Other: other classes, original right." in paper.protocol
    assert "as in the published code" in code.protocol


def test_cells_by_style_with_those_left_out() -> None:
    held_out = np.array([False, True, False, True, True])
    excluded = np.array([True, False, False, False, False])
    found = errors_corrected_cells([0, 0, 1, 1, 1], PRE, POST, LABELS, 0, held_out, excluded=excluded)
    assert found.excluded == 1
    assert {key: (cell.n_pre, cell.n_post, cell.examples) for key, cell in found.cells.items()} == {
        ("target", "train style"): (0, 0, 0),  # the only one was the exemplar
        ("target", "held-out styles"): (1, 0, 1),
        ("other", "train style"): (1, 0, 1),
        ("other", "held-out styles"): (2, 1, 2),
    }
    assert np.isnan(found.cells["target", "train style"].percent)
    table = found.table()
    assert table["percent"].tolist()[1:] == [100.0, 100.0, 50.0]
    assert list(table.columns) == ["classes", "styles", "percent", "n_pre", "n_post", "fixed", "broken", "examples"]


def test_clipping_is_asked_for() -> None:
    """One error before, three after: -200 %, which the published code reports as -100."""
    found = errors_corrected([1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0])
    assert (found.percent, found.clipped(), found.clipped(-150)) == (-200.0, -100.0, -150.0)
    assert (found.n_pre, found.n_post, found.fixed, found.broken, found.examples) == (1, 3, 1, 3, 4)
    zeros = [0, 0, 0, 0]
    cells = errors_corrected_cells(zeros, [1, 0, 0, 0], [0, 1, 1, 1], zeros, 0, TRAIN[:4])
    assert cells.table()["percent"].tolist()[0] == -200
    assert cells.table(clip=-100)["percent"].tolist()[0] == -100


def test_only_right_originals_count() -> None:
    counted = np.array(CLEAN) == np.array(LABELS)
    found = errors_corrected(PRE, POST, LABELS, counted)
    assert (found.n_pre, found.n_post, found.examples) == (3, 1, 3)
    assert found.protocol == (
        "Percent of errors corrected, 100 (N_pre - N_post) / N_pre over the examples that count (3): 3 errors before, "
        "1 after, of which 0 are new; 2 are fixed; not clipped; 100 = all gone, negative = net harm, NaN without "
        "errors before."
    )
    assert "all examples given (5)" in errors_corrected(PRE, POST, LABELS).protocol


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_fixed_minus_broken_and_outcomes_add_up(rows: list[tuple[int, int, int]]) -> None:
    before, after, labels = (list(column) for column in zip(*rows, strict=True))
    found, all_three = errors_corrected(before, after, labels), outcomes(before, after, labels)
    assert found.n_pre - found.n_post == found.fixed - found.broken
    assert (all_three.n_corrected, all_three.n_newly_wrong) == (found.fixed, found.broken)
    assert all_three.n_corrected + all_three.n_unchanged + all_three.n_newly_wrong == all_three.examples == len(rows)
    assert all_three.corrected + all_three.unchanged + all_three.newly_wrong == pytest.approx(1)
    assert all_three.n_still_wrong == found.n_pre - found.fixed <= all_three.n_unchanged
    cells = errors_corrected_cells(labels, before, after, labels, 0, np.zeros(len(rows), dtype=np.bool_))
    assert sum(cell.n_pre for cell in cells.cells.values()) == found.n_pre  # right originals: no one is left out


@pytest.mark.parametrize(
    ("corrected", "unchanged", "broken", "percents"),
    [(50, 91, 11, (32.89, 59.87, 7.24)), (5, 137, 18, (3.12, 85.63, 11.25))],
)
def test_the_published_fractions(
    corrected: int, unchanged: int, broken: int, percents: tuple[float, float, float]
) -> None:
    """VGG16, grass to snow, editing and fine-tuning: the smallest counts with these percentages, of 152 and 160."""
    before = [1] * corrected + [0] * unchanged + [0] * broken
    after = [0] * corrected + [0] * unchanged + [1] * broken
    found = outcomes(before, after, [0] * len(before))
    for value, percent in zip((found.corrected, found.unchanged, found.newly_wrong), percents, strict=True):
        assert 100 * value == pytest.approx(percent, abs=0.0051)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: percent_corrected(-1, 0),
            "There are -1 errors before and 0 after, expected counts from 0 up.",
        ),
        (
            lambda: errors_corrected(PRE, POST, LABELS, [0, 1, 2, 3, 4]),
            "Counted are int64 of shape (5,), expected bool of shape (5,).",
        ),
        (
            lambda: errors_corrected_cells(CLEAN, PRE, POST, LABELS, 0, TRAIN, others="code"),  # type: ignore[arg-type]
            "others is 'code', expected 'paper' or 'repository'.",
        ),
        (
            lambda: errors_corrected_cells(CLEAN, PRE, POST[:3], LABELS, 0, TRAIN),
            "Predictions after are int64 of shape (3,), expected integers of shape (5,): one class number each.",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
