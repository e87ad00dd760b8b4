"""Overlap of selections: by hand, against chance, and against the constant selection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.metrics import MetricError, iou, null_iou, selection_overlap


def _bits(*rows: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array([[c == "1" for c in row] for row in rows])


def test_two_selections() -> None:
    first, second = _bits("1100", "1010")
    assert iou(first, second) == pytest.approx(1 / 3)
    assert iou(first, first) == 1
    assert iou(first, ~first) == 0
    assert np.isnan(iou(np.zeros(4, dtype=np.bool_), np.zeros(4, dtype=np.bool_)))


def test_the_null() -> None:
    assert null_iou(0.05) == pytest.approx(0.0256, abs=5e-5)
    assert null_iou(0.05) == pytest.approx(0.05 / 1.95)
    assert null_iou(0.5, 0.1) == pytest.approx(0.05 / 0.55)
    assert null_iou(1.0) == 1
    assert np.isnan(null_iou(0.0))


def test_random_selections_reach_the_null() -> None:
    """A density of .05 over 6 x 3,072 bits, as for the feed-forward layers of three blocks."""
    generator = np.random.default_rng(0)
    found = selection_overlap(generator.random((12, 6 * 3072)) < 0.05, ["a", "b"] * 6)
    assert found.within == pytest.approx(0.0256, abs=1e-3)
    assert found.between == pytest.approx(0.0256, abs=1e-3)
    assert found.null == pytest.approx(0.0256, abs=1e-3)
    assert (found.pairs_within, found.pairs_between) == (30, 36)


def test_groups_by_hand() -> None:
    found = selection_overlap(_bits("1100", "1100", "0110", "0011"), ["a", "a", "b", "b"])
    assert found.within == pytest.approx((1 + 1 / 3) / 2)
    assert found.between == pytest.approx((1 / 3 + 0 + 1 / 3 + 0) / 4)
    assert found.matrix.index.tolist() == found.matrix.columns.tolist() == ["a", "b"]
    assert found.matrix.to_numpy().ravel().tolist() == pytest.approx([1, 1 / 6, 1 / 6, 1 / 3])
    assert found.null == pytest.approx(1 / 3)  # density 1/2
    assert found.mean_selection.tolist() == [True, True, False, False]
    assert found.to_mean == pytest.approx((1 + 1 + 1 / 3 + 0) / 4)
    assert found.protocol == (
        "Intersection over union of selections of 4 samples over 4 bits at mean density 0.5: mean over 2 pairs within "
        "a group and 4 pairs between groups, each pair of different samples once; 0 pairs of two empty selections are "
        "left out. Independent random selections would have 0.3333, one constant selection has 1."
    )


def test_a_constant_selection_is_alike_everywhere() -> None:
    found = selection_overlap(_bits("10100", "10100", "10100"), ["a", "a", "b"])
    assert found.within == found.between == found.to_mean == found.constant == 1
    assert found.null < 1


def test_pairs_of_empty_selections_are_left_out() -> None:
    found = selection_overlap(_bits("00", "00", "10"), ["a", "a", "a"])
    assert (found.undefined, found.pairs_within, found.within) == (1, 2, 0.0)
    assert np.isnan(found.between)
    empty = selection_overlap(_bits("00", "00"), ["a", "a"])
    assert np.isnan([empty.within, empty.null, empty.to_mean]).all()


@given(st.integers(2, 6), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_matrices_equal_pairs(samples: int, bits: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    selected, groups = (
        generator.random((samples, bits)) < 0.4,
        ["a" if x else "b" for x in generator.random(samples) < 0.5],
    )
    found = selection_overlap(selected, groups)
    values: dict[bool, list[float]] = {True: [], False: []}
    for i in range(samples):
        for j in range(i):
            values[groups[i] == groups[j]].append(iou(selected[i], selected[j]))
    for mean, pairs in ((found.within, values[True]), (found.between, values[False])):
        defined = [value for value in pairs if not np.isnan(value)]
        assert mean == pytest.approx(np.mean(defined) if defined else np.nan, nan_ok=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: null_iou(5), "Densities are 5 and 5, expected shares between 0 and 1."),
        (
            lambda: iou([0.1, 0.9], [0.2, 0.8]),
            "Bits of the first selection are float64 of shape (2,), expected bool of shape (n,).",
        ),
        (
            lambda: selection_overlap(_bits("10", "01"), ["a"]),
            "There are selections of shape (2, 2) and 1 groups, expected (samples, bits), at least 2 samples and 1 "
            "bit, and "
            "a group per sample.",
        ),
    ],
)
def test_what_is_no_selection_is_refused(call: Any, message: str) -> None:
    with pytest.raises(MetricError) as refused:
        call()
    assert str(refused.value) == message
