"""Refining by forward rows: Bayes' rule by another formula, on planted weights."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ablate import KeepPlan
from coar.estimators.gradient.estimator import Gradient
from coar.estimators.gradient.refine import NOISE_GRID, refine
from coar.estimators.gradient.shrinkage import Posterior

Doubles = npt.NDArray[np.float64]


def _planted(rows: int, components: int = 40, examples: int = 6, noise: float = 0.3) -> dict[str, Any]:
    """Weights drawn as the prior says, and outputs that are linear in them, with noise."""
    generator = np.random.default_rng(4)
    variance = generator.gamma(2.0, 0.5, (examples, components))
    mean = generator.normal(size=(examples, components))
    truth = mean + np.sqrt(variance) * generator.normal(size=mean.shape)
    keep = KeepPlan(components, rows, 0.3, 1).take(0, rows)
    outputs = keep @ truth.T + 7.0 + noise * generator.normal(size=(rows, examples))
    return {"prior": Posterior(mean, variance), "truth": truth, "keep": keep, "outputs": outputs}


def _by_hand(mean: Doubles, variance: Doubles, keep: Any, y: Doubles, noise: float) -> tuple[Doubles, Doubles]:
    """The posterior of one example in the weights' own space: (K'K / noise + D^-1)^-1."""
    k = keep - keep.mean(axis=0)
    covariance = np.linalg.inv(k.T @ k / noise + np.diag(1 / variance))
    found = mean + covariance @ k.T @ (y - y.mean() - k @ mean) / noise
    return found, np.diag(covariance)


def _likeliest(mean: Doubles, variance: Doubles, keep: Any, y: Doubles) -> float:
    k = keep - keep.mean(axis=0)
    gram = (k * variance) @ k.T
    missed = y - y.mean() - k @ mean
    best, found = -np.inf, 0.0
    for ratio in NOISE_GRID:
        whole = gram + ratio * np.trace(gram) / len(k) * np.eye(len(k))
        likelihood = -np.linalg.slogdet(whole)[1] - missed @ np.linalg.solve(whole, missed)
        if likelihood > best:
            best, found = likelihood, ratio * np.trace(gram) / len(k)
    return float(found)


@pytest.mark.parametrize("rows", [10, 30, 100])
def test_it_is_bayes_rule(rows: int) -> None:
    planted = _planted(rows)
    prior, keep, outputs = planted["prior"], planted["keep"], planted["outputs"]
    posterior, bias = refine(prior, keep, outputs)
    for e in range(len(prior.mean)):
        noise = _likeliest(prior.mean[e], prior.variance[e], keep, outputs[:, e])
        mean, variance = _by_hand(prior.mean[e], prior.variance[e], keep, outputs[:, e], noise)
        np.testing.assert_allclose(posterior.mean[e], mean, atol=1e-8)
        np.testing.assert_allclose(posterior.variance[e], variance, atol=1e-8)
        assert bias[e] == pytest.approx((outputs[:, e] - keep @ mean).mean())


@pytest.mark.parametrize("rows", [20, 60, 300])
def test_rows_bring_the_estimate_nearer_and_its_error_is_honest(rows: int) -> None:
    planted = _planted(rows, examples=40)
    posterior, _ = refine(planted["prior"], planted["keep"], planted["outputs"])
    before, after = (((p.mean - planted["truth"]) ** 2).mean() for p in (planted["prior"], posterior))
    assert after < before
    off = (posterior.mean - planted["truth"]) / np.sqrt(posterior.variance)
    assert 0.92 < (np.abs(off) < 1.96).mean() < 0.98
    assert (posterior.variance <= planted["prior"].variance).all()


def test_outputs_of_noise_alone_change_little() -> None:
    planted = _planted(50)
    outputs = planted["keep"] @ planted["prior"].mean.T + 30.0 * np.random.default_rng(0).normal(size=(50, 6))
    posterior, _ = refine(planted["prior"], planted["keep"], outputs)
    moved = ((posterior.mean - planted["prior"].mean) ** 2).mean()
    assert moved < 0.05 * planted["prior"].variance.mean()


def test_a_prior_that_is_sure_stays() -> None:
    planted = _planted(50)
    sure = Posterior(planted["prior"].mean, np.zeros_like(planted["prior"].mean))
    posterior, bias = refine(sure, planted["keep"], planted["outputs"])
    np.testing.assert_array_equal(posterior.mean, sure.mean)
    np.testing.assert_array_equal(posterior.variance, 0.0)
    np.testing.assert_allclose(bias, (planted["outputs"] - planted["keep"] @ sure.mean.T).mean(axis=0))


def test_nothing_is_changed() -> None:
    planted = _planted(30)
    arrays = [planted["prior"].mean, planted["prior"].variance, planted["keep"], planted["outputs"]]
    before = [array.copy() for array in arrays]
    refine(planted["prior"], planted["keep"], planted["outputs"])
    for array, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, then)


@pytest.mark.parametrize(("rows", "components"), [(10, 20_000), (400, 3_000), (1_200, 50)])
def test_memory_is_what_the_estimator_says(rows: int, components: int) -> None:
    """Beyond what the estimator takes without forward rows."""
    planted = _planted(rows, components, examples=2)
    tracemalloc.start()
    try:
        refine(planted["prior"], planted["keep"], planted["outputs"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with_rows, without = Gradient(forward_rows=rows), Gradient()
    said = with_rows.fixed_memory(components) - without.fixed_memory(components)
    said += 2 * with_rows.memory(components) + planted["keep"].nbytes * 0
    assert peak < said
