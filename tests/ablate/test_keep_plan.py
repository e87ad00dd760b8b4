"""Law 2: keep-vector i depends on nothing but (seed, i), in every numpy, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ablate

# 40 components, half of them ablated, seed 7: one line per row. Other bits mean other campaigns: they must be noticed.
GOLDEN = [
    "x....x.x.xxx.xxx.xx.....x..x....x..x...x",
    "x.x.xx.xx.x...x...xx..x.x....xxx.xx.x.xx",
    ".xx.xxxxxxx.x..x.xxxx.xxx.....x.xx.xxxx.",
]
GOLDEN_DIGEST = "9e503a2a4224c455"


def test_the_bits_are_pinned() -> None:
    plan = ablate.KeepPlan(components=40, rows=1_000_000, ablate_fraction=0.5, seed=7)
    rows = [plan.row(i) for i in (0, 1, 999_999)]
    assert ["".join("x" if kept else "." for kept in row) for row in rows] == GOLDEN


def test_the_bits_of_a_large_plan_are_pinned() -> None:
    keep = ablate.KeepPlan(components=5000, rows=50, ablate_fraction=0.05, seed=2**63 - 1).take(0, 50)
    assert hashlib.sha256(np.packbits(keep).tobytes()).hexdigest()[:16] == GOLDEN_DIGEST


plans = st.builds(
    ablate.KeepPlan, st.integers(1, 50), st.integers(1, 20), st.floats(0.01, 0.99), st.integers(0, 2**63 - 1)
)


@given(plans, st.data())
def test_any_span_is_its_rows_one_by_one(plan: ablate.KeepPlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.rows))
    stop = data.draw(st.integers(start, plan.rows))
    keep = plan.take(start, stop)
    assert keep.dtype == np.bool_
    assert keep.shape == (stop - start, plan.components)
    for i in range(start, stop):
        assert np.array_equal(keep[i - start], plan.row(i))


@given(plans, st.integers(1, 20))
def test_the_number_of_rows_changes_no_row(plan: ablate.KeepPlan, rows: int) -> None:
    other = ablate.KeepPlan(plan.components, rows, plan.ablate_fraction, plan.seed)
    shared = min(rows, plan.rows)
    assert np.array_equal(plan.take(0, shared), other.take(0, shared))


@given(plans, st.floats(0.01, 0.99))
def test_a_larger_fraction_ablates_more_of_the_same(plan: ablate.KeepPlan, fraction: float) -> None:
    other = ablate.KeepPlan(plan.components, plan.rows, max(fraction, *plan.fractions), plan.seed)
    assert not (other.take(0, plan.rows) & ~plan.take(0, plan.rows)).any()


def test_rows_and_seeds_differ() -> None:
    keep = ablate.KeepPlan(components=64, rows=200, ablate_fraction=0.5, seed=0).take(0, 200)
    other = ablate.KeepPlan(components=64, rows=200, ablate_fraction=0.5, seed=1).take(0, 200)
    assert len(np.unique(np.concatenate([keep, other]), axis=0)) == 400


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.9])
def test_the_ablated_share_is_the_fraction(fraction: float) -> None:
    keep = ablate.KeepPlan(components=500, rows=400, ablate_fraction=fraction, seed=3).take(0, 400)
    within = 4.5 * (fraction * (1 - fraction) / keep.size) ** 0.5
    assert abs((~keep).mean() - fraction) < within
    for axis, size in ((0, 400), (1, 500)):  # no component and no row is special
        spread = 5 * (fraction * (1 - fraction) / size) ** 0.5
        assert abs((~keep).mean(axis=axis) - fraction).max() < spread


def test_components_are_drawn_independently() -> None:
    keep = ablate.KeepPlan(components=60, rows=4000, ablate_fraction=0.3, seed=4).take(0, 4000)
    correlation = np.corrcoef(keep, rowvar=False) - np.eye(60)
    assert abs(correlation).max() < 5 / 4000**0.5
    along = np.corrcoef(keep[:-1].ravel(), keep[1:].ravel())[0, 1]
    assert abs(along) < 5 / keep.size**0.5


def test_drawing_leaves_random_state_alone(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    with untouched():
        ablate.KeepPlan(10, 10, 0.5).take(0, 10)


def test_the_description_holds_everything_a_row_depends_on() -> None:
    plan = ablate.KeepPlan(components=10, rows=4, ablate_fraction=0.25, seed=6)
    assert plan.describe() == {
        "algorithm": (
            "philox4x64(key=(seed, row)) raw 64-bit word per component, ablated if word < ablate_fraction * 2**64"
        ),
        "components": 10,
        "rows": 4,
        "ablate_fraction": 0.25,
        "seed": 6,
    }
    hashes = {
        plan.hash,
        ablate.KeepPlan(11, 4, 0.25, 6).hash,
        ablate.KeepPlan(10, 5, 0.25, 6).hash,
        ablate.KeepPlan(10, 4, 0.5, 6).hash,
        ablate.KeepPlan(10, 4, 0.25, 7).hash,
    }
    assert len(hashes) == 5
    numpy: Any = ablate.KeepPlan
    assert numpy(np.int64(10), np.int32(4), np.float32(0.25), np.uint8(6)).hash == plan.hash
    assert plan == ablate.KeepPlan(10, 4, 0.25, 6)
    assert plan.hash == ablate.KeepPlan(10, 4, 0.25, 6).hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0.1, 0), "A plan needs components and rows >= 1, got 0 and 5."),
        ((5, 0, 0.1, 0), "A plan needs components and rows >= 1, got 5 and 0."),
        ((5, 5, 0.0, 0), "ablate_fraction is 0.0, expected a number between 0 and 1 (exclusive)."),
        ((5, 5, 1.0, 0), "ablate_fraction is 1.0, expected a number between 0 and 1 (exclusive)."),
        ((5, 5, float("nan"), 0), "ablate_fraction is nan, expected a number between 0 and 1 (exclusive)."),
        ((5, 5, [0.1, 1.5], 0), "ablate_fraction is 1.5, expected a number between 0 and 1 (exclusive)."),
        ((5, 5, [], 0), "ablate_fraction is [], expected a number, or one or more numbers that differ."),
        (
            (5, 5, (0.1, 0.1), 0),
            "ablate_fraction is [0.1, 0.1], expected a number, or one or more numbers that differ.",
        ),
        ((5, 5, 0.1, -1), "seed is -1, expected an integer from 0 to 2**63 - 1."),
        ((5, 5, 0.1, 2**63), f"seed is {2**63}, expected an integer from 0 to 2**63 - 1."),
    ],
)
def test_plans_that_cannot_be(arguments: tuple[int, int, Any, int], message: str) -> None:
    with pytest.raises(ablate.KeepError) as caught:
        ablate.KeepPlan(*arguments)
    assert str(caught.value) == message


def test_rows_that_do_not_exist() -> None:
    plan = ablate.KeepPlan(5, 4, 0.5)
    for i in (-1, 4):
        with pytest.raises(IndexError, match=rf"^Keep row {i} does not exist; rows are 0 to 3\.$"):
            plan.row(i)
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        message = rf"^Keep rows {start} to {stop} do not exist; give 0 <= start <= stop <= 4\.$"
        with pytest.raises(IndexError, match=message):
            plan.take(start, stop)


def test_of_several_fractions_each_row_has_its_own() -> None:
    plan = ablate.KeepPlan(components=200, rows=9, ablate_fraction=[0.02, 0.3, 0.6], seed=7)
    keep = plan.take(0, 9)
    for i in range(9):
        alone = ablate.KeepPlan(200, 9, (0.02, 0.3, 0.6)[i % 3], 7)
        assert np.array_equal(keep[i], alone.row(i))
        assert np.array_equal(keep[i], plan.row(i))
    shares = (~keep).mean(axis=1).reshape(3, 3)
    np.testing.assert_allclose(shares, np.tile([0.02, 0.3, 0.6], (3, 1)), atol=0.12)


def test_several_fractions_are_described() -> None:
    plan = ablate.KeepPlan(10, 4, [0.25, 0.5], 6)
    assert plan.describe() == {
        "algorithm": (
            "philox4x64(key=(seed, row)) raw 64-bit word per component, ablated if word < ablate_fraction * 2**64; "
            "row i has ablate_fraction[i % (number of fractions)]"
        ),
        "components": 10,
        "rows": 4,
        "ablate_fraction": [0.25, 0.5],
        "seed": 6,
    }
    assert plan == ablate.KeepPlan(10, 4, (0.25, 0.5), 6)
    assert hash(plan) == hash(ablate.KeepPlan(10, 4, np.array([0.25, 0.5]).tolist(), 6))
    assert plan.fractions == (0.25, 0.5)
    assert plan.hash != ablate.KeepPlan(10, 4, [0.5, 0.25], 6).hash


def test_a_list_of_one_fraction_is_that_fraction() -> None:
    one, plan = ablate.KeepPlan(10, 4, [0.25], 6), ablate.KeepPlan(10, 4, 0.25, 6)
    assert one == plan
    assert one.hash == plan.hash
    assert one.describe()["ablate_fraction"] == 0.25
    # as it was before there could be several: stores of old campaigns go on
    assert plan.hash == "2f8e5a3e74ee29445381fec3b733397e85573a9549add9ac9defeb5be979b49d"
