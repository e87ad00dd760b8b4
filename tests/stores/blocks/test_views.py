"""The views `outputs` and `keep` read what numpy would: one law, tried on every kind of index."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores import AttributionStore, CampaignStore, Rows


def _index(length: int) -> st.SearchStrategy[Any]:
    """Everything that may stand for one axis: an int, a slice, a list, an array, a mask, all of it."""
    one = st.integers(-length, length - 1)
    bound = st.none() | st.integers(-length - 2, length + 2)
    step = st.sampled_from([None, 1, 2, 3, -1, -2])
    return st.one_of(
        one,
        one.map(np.int64),
        st.builds(slice, bound, bound, step),
        st.lists(one, max_size=6),
        st.lists(one, min_size=1, max_size=6).map(np.array),
        st.lists(st.booleans(), min_size=length, max_size=length).map(np.array),
        st.just(Ellipsis),
    )


def _numpy(whole: npt.NDArray[Any], rows: Any, columns: Any) -> npt.NDArray[Any]:
    """Rows first, then columns: what both mean when each selects for itself."""
    rows, columns = ([*key] if isinstance(key, list) and key else key for key in (rows, columns))
    rows, columns = (np.zeros(0, dtype=int) if isinstance(key, list) and not key else key for key in (rows, columns))
    chosen = whole[rows] if rows is not Ellipsis else whole
    return chosen[..., columns] if columns is not Ellipsis else chosen


@given(rows=_index(10), columns=_index(5))
def test_outputs_read_as_numpy_does(
    campaign: CampaignStore, outputs: npt.NDArray[np.float32], rows: Any, columns: Any
) -> None:
    np.testing.assert_array_equal(campaign.outputs[rows, columns], _numpy(outputs, rows, columns), strict=True)
    np.testing.assert_array_equal(campaign.outputs[rows], _numpy(outputs, rows, ...), strict=True)


@given(rows=_index(10), columns=_index(11))
def test_keep_reads_as_numpy_does(
    campaign: CampaignStore, keep: npt.NDArray[np.bool_], rows: Any, columns: Any
) -> None:
    np.testing.assert_array_equal(campaign.keep[rows, columns], _numpy(keep, rows, columns), strict=True)
    np.testing.assert_array_equal(campaign.keep[rows], _numpy(keep, rows, ...), strict=True)


@given(rows=_index(7))
def test_a_view_of_one_dimension_reads_as_numpy_does(
    attributions: AttributionStore, estimates: dict[str, npt.NDArray[np.float32]], rows: Any
) -> None:
    np.testing.assert_array_equal(attributions.bias[rows], _numpy(estimates["bias"], rows, ...), strict=True)


def test_a_view_knows_its_shape_and_becomes_an_array(campaign: CampaignStore, keep: npt.NDArray[np.bool_]) -> None:
    assert isinstance(campaign.keep, Rows)
    assert (campaign.keep.shape, campaign.keep.dtype, len(campaign.keep)) == ((10, 11), np.dtype(np.bool_), 10)
    assert (campaign.outputs.shape, campaign.outputs.dtype) == ((10, 5), np.dtype(np.float32))
    assert repr(campaign.keep) == "<keep: 10 x 11 bool, read by indexing>"
    np.testing.assert_array_equal(np.asarray(campaign.keep), keep)
    np.testing.assert_array_equal(np.stack(list(campaign.keep)), keep)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, r"Index None is no int, slice, or 1-D list of ints or bools\."),
        (True, r"Index True is no int, slice, or 1-D list of ints or bools\."),
        (1.0, r"Index 1\.0 is no int, slice, or 1-D list of ints or bools\."),
        ("a", r"Index 'a' is no int, slice, or 1-D list of ints or bools\."),
        ([[0, 1]], r"Index \[\[0, 1\]\] is no int, slice, or 1-D list of ints or bools\."),
        ((0, None), r"Index None is no int, slice"),
        ((0, 0, 0), r"outputs has 2 dimensions, got 3 indices\."),
        ((), r"outputs has 2 dimensions, got 0 indices\."),
        (10, "index 10 is out of bounds for axis 0 with size 10"),
        ((0, 5), "index 5 is out of bounds for axis 0 with size 5"),
        ((0, [-6]), "index -6 is out of bounds for axis 0 with size 5"),
        (np.ones(9, dtype=bool), "boolean index did not match"),
    ],
)
def test_an_index_that_means_nothing_is_refused(campaign: CampaignStore, key: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        campaign.outputs[key]


def test_a_column_of_a_view_of_one_dimension_is_refused(attributions: AttributionStore) -> None:
    with pytest.raises(IndexError, match=r"bias has 1 dimensions, got 2 indices\."):
        attributions.bias[1, 2]
