"""The learning rate of PAINT's published code."""

from __future__ import annotations

import pytest

from coar.editing.training.schedules import warm_up_cosine


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 2e-8), (249, 5e-6), (499, 1e-5), (500, 1e-5), (1422, 5.004e-6)], ids=str
)
def test_published_values(step: int, rate: float) -> None:
    assert 1e-5 * warm_up_cosine(step, warm_up=500, steps=2345) == pytest.approx(rate, rel=1e-4)


def test_it_never_leaves_a_warm_up_that_is_too_long() -> None:
    """KITTI in the published code: 5 epochs of 47 batches, and a warm-up of 500 steps."""
    assert 1e-5 * warm_up_cosine(234, warm_up=500, steps=235) == pytest.approx(4.7e-6)
    assert warm_up_cosine(9, warm_up=10, steps=10) == 1.0


def test_without_warm_up_it_only_falls() -> None:
    rates = [warm_up_cosine(step, 0, 10) for step in range(10)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.5)
