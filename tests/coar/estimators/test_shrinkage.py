"""Empirical Bayes on data whose truth is planted: better than what it is made of, and its errors are honest."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from coar.estimators.gradient.design import GateDesign
from coar.estimators.gradient.moments import GradientSums, Moments
from coar.estimators.gradient.shrinkage import BACKGROUND_RATIO, Posterior, shrink

Doubles = npt.NDArray[np.float64]
EXAMPLES, COMPONENTS = 60, 80
LAYERS = np.repeat([0, 1], COMPONENTS // 2)


class Planted:
    """Gradients of which everything is known, as `shrink` models them.

    weight = factor x slope + deviation; a gradient at gate u is weight + slant x slope x (u - 1/2) + noise, whose
    variance is as many times that of a gradient at gate 1 as `shrink` supposes. Deviations of examples share two
    directions.
    """

    def __init__(
        self, seed: int, *, examples: int = EXAMPLES, components: int = COMPONENTS, noise: float = 1.0
    ) -> None:
        self.generator = np.random.default_rng(seed)
        shape = (examples, components)
        size = np.repeat([1.0, 3.0], [components // 2, components - components // 2])
        self.slope = self.generator.normal(size=shape) * size
        directions = self.generator.normal(size=(examples, 2)) @ self.generator.normal(size=(2, components))
        self.truth = 1.3 * self.slope + 0.4 * (directions + self.generator.normal(size=shape)) * size
        self.noise = noise * size

    def moments(self, passes: int, seed: int = 0, background: str = "continuous", scale: float = 1.0) -> Moments:
        examples, components = self.truth.shape
        design = GateDesign(components, 0.1, background, seed)
        drawn, sums = design.passes(range(examples)), GradientSums(examples, components, torch.float64)
        for _ in range(passes):
            one = drawn.next()
            noise = self.generator.normal(size=self.truth.shape) * self.noise
            gradients = np.where(
                one.sampled,
                self.truth + 0.8 * self.slope * (one.u - 0.5) + noise,
                self.slope + noise / BACKGROUND_RATIO**0.5,
            )
            sums.add(one, torch.zeros(examples), torch.from_numpy(scale * gradients))
        return Moments.of(sums, drawn.start)


def _path(moments: Moments) -> Doubles:
    return np.asarray(moments.total / np.maximum(moments.count, 1))


def _error(found: Doubles, planted: Planted) -> float:
    return float(np.sqrt(((found - planted.truth) ** 2).mean()))


def _layers(components: int) -> npt.NDArray[np.int64]:
    return np.repeat([0, 1], [components // 2, components - components // 2])


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("passes", [2, 5, 10, 20, 50, 100])
def test_closer_to_the_truth_than_path_and_slope(passes: int, noise: float) -> None:
    planted = Planted(1, noise=noise)
    moments = planted.moments(passes)
    found = shrink(moments, LAYERS).mean
    path = np.where(moments.count > 0, _path(moments), moments.slope)
    assert _error(found, planted) < min(_error(path, planted), _error(moments.slope, planted))


@pytest.mark.parametrize("passes", [20, 50, 150])
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_intervals_cover_what_they_say(passes: int, noise: float) -> None:
    covered = []
    for seed in range(2):
        planted = Planted(10 + seed, noise=noise, examples=150, components=300)
        found = shrink(planted.moments(passes, seed), _layers(300))
        covered.append(np.abs(found.mean - planted.truth) < 1.96 * np.sqrt(found.variance))
    assert 0.93 < np.mean(covered) < 0.97


def test_more_passes_lead_to_the_path_estimate() -> None:
    planted = Planted(2)
    away = []
    for passes in (10, 100, 1000):
        moments = planted.moments(passes)
        found = shrink(moments, LAYERS)
        away.append(np.abs(found.mean - _path(moments)).mean())
        assert _error(found.mean, planted) == pytest.approx(np.sqrt(found.variance.mean()), rel=0.2)
    assert away[0] > 3 * away[1] > 9 * away[2]
    assert away[2] < 0.02


@pytest.mark.parametrize("examples", [1, 2, 7, 8])
@pytest.mark.parametrize("passes", [1, 2, 5, 10, 40])
def test_few_examples(examples: int, passes: int) -> None:
    errors, slopes = [], []
    for seed in range(12):
        planted = Planted(seed, examples=examples)
        moments = planted.moments(passes)
        found = shrink(moments, LAYERS)
        assert np.isfinite(found.mean).all()
        assert np.isfinite(found.variance).all()
        assert (found.variance >= 0).all()
        errors.append(_error(found.mean, planted))
        slopes.append(_error(moments.slope, planted))
    assert np.mean(errors) < 1.02 * np.mean(slopes), "on the mean of a dozen draws, no worse than the slope alone"


@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize("passes", [2, 3, 30])
def test_few_components(components: int, passes: int) -> None:
    planted = Planted(4, components=components)
    found = shrink(planted.moments(passes), _layers(components))
    assert np.isfinite(found.mean).all()
    assert np.isfinite(found.variance).all()


@pytest.mark.parametrize("examples", [1, 2, 9, 40])
@pytest.mark.parametrize("passes", [1, 2, 10, 20])
def test_dead_components_have_weight_zero(examples: int, passes: int) -> None:
    """All of them, a layer of them, or some in a living layer: zeros, and no warning (warnings are errors)."""
    for dead in (slice(0, COMPONENTS), slice(0, COMPONENTS // 2), slice(3, 9)):
        planted = Planted(5, examples=examples)
        planted.slope[:, dead] = planted.truth[:, dead] = planted.noise[dead] = 0.0
        found = shrink(planted.moments(passes), LAYERS)
        assert (found.mean[:, dead] == 0).all()
        assert (found.variance[:, dead] < 0.5 * planted.truth.var() + 1e-12).all()
        assert np.isfinite(found.mean).all()
        assert np.isfinite(found.variance).all()
        if dead != slice(3, 9):
            assert (found.variance[:, dead] < 1e-12).all()


@pytest.mark.parametrize("slope", [1.0, 0.37, -2e-4])
def test_a_single_sample_of_a_single_component_is_taken_as_it_is(slope: float) -> None:
    """Factor and slant cannot be told apart by one gate: it must not matter."""
    drawn, sums = GateDesign(1, 0.3, "continuous", 1).passes(range(1)), GradientSums(1, 1, torch.float64)
    one = drawn.next()
    sums.add(one, torch.zeros(1), torch.full((1, 1), 0.7, dtype=torch.float64))
    moments = replace(Moments.of(sums, drawn.start), slope=np.full((1, 1), slope))
    assert shrink(moments, np.zeros(1, dtype=np.int64)).mean[0, 0] == pytest.approx(0.7, rel=1e-6)


def test_an_example_without_gradients() -> None:
    planted = Planted(6)
    planted.slope[7] = planted.truth[7] = 0.0
    moments = planted.moments(20)
    values = ("total", "even_mean", "odd_mean", "squares", "slanted", "slope", "slope_variance")
    silent = np.arange(EXAMPLES)[:, None] == 7
    moments = replace(moments, **{name: np.where(silent, 0.0, getattr(moments, name)) for name in values})
    found = shrink(moments, LAYERS)
    assert np.isfinite(found.mean).all()
    assert np.abs(found.mean[7]).max() < 1e-6
    assert np.sqrt(found.variance[7].mean()) < 0.2 * np.sqrt(found.variance[8].mean())


def test_one_sample_each_is_still_better_than_slopes() -> None:
    planted = Planted(7)
    moments = planted.moments(5)  # one round
    assert (moments.count == 1).all()
    found = shrink(moments, LAYERS)
    assert _error(found.mean, planted) < min(_error(moments.slope, planted), _error(_path(moments), planted))
    assert 0.5 < np.sqrt(found.variance.mean()) / _error(found.mean, planted) < 2


def test_components_without_a_sample_are_less_certain() -> None:
    planted = Planted(8, noise=0.3)
    moments = planted.moments(3)  # of 5 passes in a round
    missing = moments.count == 0
    assert 0.3 < missing.mean() < 0.5
    found = shrink(moments, LAYERS)
    off, off_slope = found.mean - planted.truth, moments.slope - planted.truth
    assert (off[missing] ** 2).mean() < (off_slope[missing] ** 2).mean()
    assert found.variance[missing].mean() > found.variance[~missing].mean()


def _permuted(moments: Moments, rows: Any, columns: Any) -> Moments:
    return replace(moments, **{f.name: getattr(moments, f.name)[rows][:, columns] for f in fields(moments)})


def _assert_same(one: Posterior, other: Posterior, scale: float = 1.0) -> None:
    size = np.abs(one.mean).max()
    np.testing.assert_allclose(other.mean / scale, one.mean, rtol=1e-6, atol=1e-9 * size)
    np.testing.assert_allclose(other.variance / scale**2, one.variance, rtol=1e-6, atol=1e-9 * one.variance.max())


@pytest.mark.parametrize("passes", [2, 5, 20, 60])
def test_the_order_of_examples_and_components_does_not_matter(passes: int) -> None:
    planted = Planted(9)
    moments = planted.moments(passes)
    rows, columns = planted.generator.permutation(EXAMPLES), planted.generator.permutation(COMPONENTS)
    found = shrink(moments, LAYERS)
    other = shrink(_permuted(moments, rows, columns), 1 - LAYERS[columns])
    _assert_same(Posterior(found.mean[rows][:, columns], found.variance[rows][:, columns]), other)


@pytest.mark.parametrize("scale", [1000.0, 1e-3, 1e-30, 1e30])
@pytest.mark.parametrize("passes", [2, 5, 20, 60])
def test_weights_and_errors_scale_with_the_output(passes: int, scale: float) -> None:
    found = shrink(Planted(11).moments(passes), LAYERS)
    _assert_same(found, shrink(Planted(11).moments(passes, scale=scale), LAYERS), scale)


def test_nothing_is_changed() -> None:
    moments = Planted(12).moments(12)
    before = {f.name: getattr(moments, f.name).copy() for f in fields(moments)}
    shrink(moments, LAYERS)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(moments, name), value, err_msg=name)
