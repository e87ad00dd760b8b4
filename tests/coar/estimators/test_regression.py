"""The regression equals scikit-learn on the rows it says it fits, for any shape, penalty, block and slab."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, LinearRegression, Ridge, RidgeCV

import coar
from ablate import KeepPlan
from coar.estimators.regression.arrays import TorchArrays
from coar.estimators.regression.fit import RIDGE_GRID
from stores import CampaignStore

Floats = npt.NDArray[np.floating[Any]]
Keep = npt.NDArray[np.bool_]
WriteCampaign = Callable[..., CampaignStore]


def _close(found: npt.ArrayLike, expected: npt.ArrayLike, relative: float = 1e-5) -> None:
    """Fails unless every number is right to so much of the largest."""
    wanted = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=relative, atol=relative * np.abs(wanted).max())


def _fitted_rows(campaign: CampaignStore) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns keep (as 0 and 1) and outputs of the finished rows that are not held out."""
    fitted = campaign.finished_rows % 10 != 9
    return campaign.keep[:][fitted].astype(np.float64), campaign.outputs[:][fitted].astype(np.float64)


def _some_outputs(keep: Keep, examples: int, seed: int) -> Floats:
    """Outputs with linear part, interactions, noise and an offset, as real ones have."""
    generator = np.random.default_rng(seed)
    kept = keep.astype(np.float64)
    linear = kept @ generator.normal(size=(keep.shape[1], examples))
    products = (kept * np.roll(kept, 1, axis=1)) @ generator.normal(size=(keep.shape[1], examples))
    return linear + products + generator.normal(size=linear.shape) + generator.normal(0, 20, examples)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    components=st.integers(1, 24),
    examples=st.integers(1, 5),
    rows=st.integers(20, 70),
    block_rows=st.integers(7, 40),
    ridge=st.sampled_from([0.0, 1e-3, 0.5, 30.0]),
)
def test_equals_scikit_learn(
    write_campaign: WriteCampaign,
    draw_keep: Callable[..., Keep],
    seed: int,
    components: int,
    examples: int,
    rows: int,
    block_rows: int,
    ridge: float,
) -> None:
    keep = draw_keep(rows, components, 0.3, seed)
    campaign = write_campaign(keep, _some_outputs(keep, examples, seed), block_rows=block_rows)
    K, Y = _fitted_rows(campaign)
    if np.linalg.matrix_rank(K - K.mean(axis=0)) < components and ridge == 0:
        with pytest.raises(coar.FitError, match="ridge=0 has no unique solution"):
            coar.fit(campaign, ridge=ridge)
        return
    if not (K - K.mean(axis=0)).any():
        return  # nothing was ablated: a test of its own
    found = coar.fit(campaign, ridge=ridge)
    model = (Ridge(alpha=ridge) if ridge else LinearRegression()).fit(K, Y)
    _close(found.weights[:], model.coef_.reshape(examples, components))
    _close(found.bias[:], model.intercept_)


def _slow_choice(campaign: CampaignStore) -> tuple[list[float], Floats, Floats]:
    """The chosen penalties, weights and biases, as straightforwardly as can be: every row is left out in turn."""
    K, Y = _fitted_rows(campaign)
    centred = K - K.mean(axis=0)
    grid = RIDGE_GRID * (centred**2).sum() / K.shape[1]
    errors = np.zeros((len(grid), Y.shape[1]))
    for out in range(len(K)):
        rest = np.arange(len(K)) != out
        for r, ridge in enumerate(grid):
            model = Ridge(alpha=ridge).fit(K[rest], Y[rest])
            errors[r] += (model.predict(K[out : out + 1])[0] - Y[out]) ** 2
    chosen = [float(ridge) for ridge in grid[errors.argmin(axis=0)]]
    models = [Ridge(alpha=ridge).fit(K, y) for ridge, y in zip(chosen, Y.T, strict=True)]
    return chosen, np.array([model.coef_ for model in models]), np.array([model.intercept_ for model in models])


@pytest.mark.parametrize("components", [6, 90], ids=["more rows than components", "fewer rows than components"])
def test_the_chosen_penalty_is_that_of_a_slow_search(
    write_campaign: WriteCampaign, draw_keep: Callable[..., Keep], components: int
) -> None:
    keep = draw_keep(45, components)
    campaign = write_campaign(keep, _some_outputs(keep, 8, seed=3), block_rows=17)
    ridges, weights, bias = _slow_choice(campaign)
    found = coar.fit(campaign)
    assert len(set(ridges)) > 1, "this test should see several penalties"
    np.testing.assert_allclose(found.quality["ridge"], ridges, rtol=1e-6)
    _close(found.weights[:], weights)
    _close(found.bias[:], bias)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    components=st.integers(1, 60),
    examples=st.integers(2, 5),
    rows=st.integers(20, 70),
    held_out=st.booleans(),
)
@example(seed=0, components=24, examples=2, rows=20, held_out=False)  # errors of small penalties are nearly equal
def test_equals_ridge_cv(
    write_campaign: WriteCampaign,
    draw_keep: Callable[..., Keep],
    seed: int,
    components: int,
    examples: int,
    rows: int,
    held_out: bool,
) -> None:
    keep = draw_keep(rows, components, 0.3, seed)
    campaign = write_campaign(keep, _some_outputs(keep, examples, seed))
    K, Y = campaign.keep[:].astype(np.float64), campaign.outputs[:].astype(np.float64)
    if held_out:
        K, Y = _fitted_rows(campaign)
    scale = ((K - K.mean(axis=0)) ** 2).sum() / components
    if not scale:
        return
    model = RidgeCV(alphas=RIDGE_GRID * scale, alpha_per_target=True).fit(K, Y)
    found = coar.fit(campaign, held_out=held_out)
    np.testing.assert_allclose(found.quality["ridge"], model.alpha_, rtol=1e-6)
    _close(found.weights[:], model.coef_)
    _close(found.bias[:], model.intercept_)


def test_recovers_a_planted_linear_truth(planted: CampaignStore, truth: tuple[Floats, Floats]) -> None:
    weights, bias = truth
    found = coar.fit(planted, ridge=0)
    _close(found.weights[:], weights)
    _close(found.bias[:], bias)
    np.testing.assert_allclose(found.quality["correlation"], 1.0, atol=1e-6)
    np.testing.assert_allclose(found.quality["r2"], 1.0, atol=1e-6)


def test_a_noisy_truth_is_within_the_standard_errors(noisy: CampaignStore, truth: tuple[Floats, Floats]) -> None:
    weights, _ = truth
    found = coar.fit(noisy, ridge=0)
    missed = np.abs(found.weights[:] - weights) / found.stderr[:]
    assert missed.max() < 4.5  # 360 draws: beyond 4.5 standard errors less than once in a hundred tests
    assert 0.9 < np.sqrt((missed**2).mean()) < 1.1
    np.testing.assert_allclose(found.quality["residual_sd"].mean(), 0.5, rtol=0.05)


@pytest.mark.parametrize(("ridge", "rows"), [(0.0, 200), (7.0, 200), (7.0, 20)], ids=["ols", "ridge", "dual"])
def test_standard_errors_are_the_textbook_ones(
    write_campaign: WriteCampaign, noisy: CampaignStore, planted_keep: Keep, ridge: float, rows: int
) -> None:
    """Least squares' own, and the posterior's of ridge."""
    keep = np.concatenate([planted_keep, ~planted_keep], axis=1)[:rows] if rows == 20 else planted_keep
    noisy = write_campaign(keep, noisy.outputs[:rows])
    K, Y = _fitted_rows(noisy)
    K, Y = K - K.mean(axis=0), Y - Y.mean(axis=0)
    G = K.T @ K
    inverse = np.linalg.inv(G + ridge * np.eye(len(G)))
    residuals = Y - K @ inverse @ K.T @ Y
    freedom = len(K) - 1 - np.trace(K @ inverse @ K.T)
    sd = np.sqrt((residuals**2).sum(axis=0) / freedom)
    found = coar.fit(noisy, ridge=ridge)
    _close(found.quality["residual_sd"], sd)
    _close(found.stderr[:], np.outer(sd, np.sqrt(np.diag(inverse))))


def test_intervals_cover_as_often_as_they_say(write_campaign: WriteCampaign, draw_keep: Callable[..., Keep]) -> None:
    generator = np.random.default_rng(8)
    keep, weights = draw_keep(150, 8), generator.normal(size=(8, 1000))
    campaign = write_campaign(keep, keep @ weights + generator.normal(0, 2, (150, 1000)), block_rows=50)
    found = coar.fit(campaign, ridge=0)
    covered = np.abs(found.weights[:] - weights.T) < 1.96 * found.stderr[:]
    assert 0.94 < covered.mean() < 0.96  # 8,000 intervals


@pytest.mark.parametrize(("rows", "components"), [(300, 40), (300, 400)], ids=["primal", "dual"])
def test_intervals_of_ridge_cover_too(
    write_campaign: WriteCampaign, draw_keep: Callable[..., Keep], rows: int, components: int
) -> None:
    """On average over components, shrinkage and all, where the weights are as the penalty supposes: normal."""
    generator = np.random.default_rng(9)
    keep, weights = draw_keep(rows, components), generator.normal(size=(components, 100))
    campaign = write_campaign(keep, keep @ weights + generator.normal(0, 5, (rows, 100)), block_rows=50)
    found = coar.fit(campaign, held_out=False)
    covered = np.abs(found.weights[:] - weights.T) < 1.96 * found.stderr[:]
    assert 0.93 < covered.mean() < 0.97


def test_a_common_offset_moves_the_bias_alone(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    outputs = np.round(_some_outputs(planted_keep, 6, seed=4) * 8) / 8  # float32 keeps eighths near a million
    near, far = (coar.fit(write_campaign(planted_keep, outputs + offset)) for offset in (0.0, 1e6))
    _close(far.weights[:], near.weights[:], 1e-6)
    _close(far.stderr[:], near.stderr[:], 1e-6)
    np.testing.assert_allclose(far.bias[:], near.bias[:] + 1e6, atol=0.07)  # float32 near a million: steps of 1/16
    np.testing.assert_allclose(far.quality, near.quality, rtol=1e-6)


@pytest.mark.parametrize("block_rows", [1, 9, 200])
def test_the_campaigns_blocks_change_nothing(
    write_campaign: WriteCampaign, noisy: CampaignStore, planted_keep: Keep, block_rows: int
) -> None:
    expected = coar.fit(noisy)
    found = coar.fit(write_campaign(planted_keep, noisy.outputs[:], block_rows=block_rows))
    _close(found.weights[:], expected.weights[:], 1e-6)
    _close(found.stderr[:], expected.stderr[:], 1e-6)
    _close(found.bias[:], expected.bias[:], 1e-6)
    np.testing.assert_allclose(found.quality, expected.quality, rtol=1e-5)


def test_the_memory_budget_changes_nothing(noisy: CampaignStore) -> None:
    with pytest.raises(coar.FitError, match="too small") as refused:
        coar.fit(noisy, memory=1)
    least = int(re.findall(r"at least ([\d,]+)", str(refused.value))[0].replace(",", ""))
    expected, found = coar.fit(noisy), coar.fit(noisy, memory=least)
    assert found.store.block_examples == 1, "this test should fit example by example"
    _close(found.weights[:], expected.weights[:], 1e-6)
    _close(found.stderr[:], expected.stderr[:], 1e-6)
    np.testing.assert_allclose(found.quality, expected.quality, rtol=1e-5)


def test_quality_is_measured_on_the_held_out_rows(noisy: CampaignStore) -> None:
    found = coar.fit(noisy)
    held_out = np.arange(200) % 10 == 9
    predicted = found.predict(noisy.keep[:][held_out]).astype(np.float64)
    actual = noisy.outputs[:][held_out].astype(np.float64)
    correlations = [np.corrcoef(p, a)[0, 1] for p, a in zip(predicted.T, actual.T, strict=True)]
    shares = 1 - ((actual - predicted) ** 2).sum(axis=0) / ((actual - actual.mean(axis=0)) ** 2).sum(axis=0)
    np.testing.assert_allclose(found.quality["correlation"], correlations, rtol=1e-5)
    np.testing.assert_allclose(found.quality["r2"], shares, rtol=1e-4)


@pytest.mark.parametrize("ridge", [None, 0.0, 1.0])
def test_constant_outputs_have_no_weights_and_no_correlation(
    write_campaign: WriteCampaign, planted_keep: Keep, ridge: float | None
) -> None:
    outputs = np.tile([0.1, -7.3, 0.0], (200, 1))
    outputs[:, 2] = planted_keep[:, 4]
    found = coar.fit(write_campaign(planted_keep, outputs), ridge=ridge)
    assert not found.weights[:2].any()
    assert not found.stderr[:2].any()
    np.testing.assert_array_equal(found.bias[:2], np.array([0.1, -7.3], dtype=np.float32))
    assert found.quality["correlation"].isna().tolist() == [True, True, False]
    assert found.quality["r2"].isna().tolist() == [True, True, False]
    assert found.top(0)["weight"].eq(0).all()
    if ridge is None:
        assert (
            found.quality["ridge"][0] == found.quality["ridge"][1] == found.quality["ridge"].max()
        )  # ties: the largest
        np.testing.assert_allclose(found.quality["ridge"][0] / found.quality["ridge"][2], 1e7, rtol=1e-4)
    assert "held-out correlation 1.000" in repr(found)


def test_outputs_that_are_all_constant_still_describe_themselves(
    write_campaign: WriteCampaign, planted_keep: Keep
) -> None:
    found = coar.fit(write_campaign(planted_keep, np.full((200, 2), 3.0)))
    assert repr(found).startswith("<Attributions: 2 examples x 12 components, held-out correlation undefined")


def test_a_component_that_was_never_ablated_has_no_weight(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    keep = planted_keep.copy()
    keep[:, 5] = True
    campaign = write_campaign(keep, _some_outputs(keep, 4, seed=5))
    found = coar.fit(campaign)
    np.testing.assert_allclose(found.weights[:, 5], 0, atol=1e-6)
    unknown = found.quality["residual_sd"] / np.sqrt(found.quality["ridge"])  # what ridge supposes of any weight
    np.testing.assert_allclose(found.stderr[:, 5], unknown, rtol=1e-5)
    assert (found.quality["correlation"] > 0.5).all()
    with pytest.raises(coar.FitError) as refused:
        coar.fit(campaign, ridge=0)
    assert str(refused.value) == (
        "ridge=0 has no unique solution: 180 rows for 12 components, or a component that was never ablated. Run more "
        "rows, or give ridge > 0 (or None)."
    )


@pytest.mark.parametrize("ridge", [None, 0.0, 1.0])
def test_nothing_ablated_at_all_is_refused(write_campaign: WriteCampaign, ridge: float | None) -> None:
    campaign = write_campaign(np.ones((40, 3), dtype=np.bool_), np.ones((40, 2)))
    with pytest.raises(coar.FitError, match="The 36 rows to fit all have the same keep-vector"):
        coar.fit(campaign, ridge=ridge)


def test_only_finished_blocks_are_used(write_campaign: WriteCampaign, noisy: CampaignStore, planted_keep: Keep) -> None:
    blocks = [0, 1, 2, 4, 7]
    campaign = write_campaign(planted_keep, noisy.outputs[:], blocks=blocks)
    rows = np.concatenate([np.arange(20 * b, 20 * b + 20) for b in blocks])
    fitted = rows[rows % 10 != 9]
    expected = Ridge(alpha=2.0).fit(planted_keep[fitted], noisy.outputs[fitted].astype(np.float64))
    found = coar.fit(campaign, ridge=2.0)
    _close(found.weights[:], expected.coef_)
    _close(found.bias[:], expected.intercept_)
    assert found.header["identity"]["rows"] == 100


@pytest.mark.parametrize("method", ["ridge", "ols", "lasso"])
def test_rows_of_one_ablate_fraction(write_campaign: WriteCampaign, method: Any) -> None:
    """Of two fractions, a campaign of row pairs: every tenth pair is held out, both of it."""
    fractions = (0.2, 0.4)
    keep = KeepPlan(8, 240, fractions, 0).take(0, 240)
    outputs = _some_outputs(keep, 3, seed=1)
    campaign = write_campaign(keep, outputs, block_rows=50, ablate_fraction=fractions)
    for which, fraction in enumerate(fractions):
        found = coar.fit(campaign, method=method, ablate_fraction=fraction)
        alone = coar.fit(write_campaign(keep[which::2], outputs[which::2]), method=method)
        _close(found.weights[:], alone.weights[:], 1e-6)
        _close(found.stderr[:], alone.stderr[:], 1e-6)
        np.testing.assert_allclose(found.quality, alone.quality, rtol=1e-5)
        assert found.header["identity"]["ablate_fraction"] == fraction
        assert found.header["identity"]["rows"] == 120
    together = coar.fit(campaign, ridge=2.0)
    fitted = np.arange(240) // 2 % 10 != 9
    _close(together.weights[:], Ridge(alpha=2.0).fit(keep[fitted], campaign.outputs[:][fitted].astype(float)).coef_)
    with pytest.raises(coar.FitError) as refused:
        coar.fit(campaign, ablate_fraction=0.3)
    assert str(refused.value) == f"{campaign.where} has no rows of ablate_fraction=0.3; it has 0.2, 0.4."


@pytest.mark.parametrize("method", ["ridge", "lasso"])
def test_without_held_out_rows_all_are_fitted(noisy: CampaignStore, planted_keep: Keep, method: Any) -> None:
    found = coar.fit(noisy, method=method, held_out=False)
    penalty = float(found.quality[method][3])
    model = Ridge(alpha=penalty) if method == "ridge" else Lasso(alpha=penalty, tol=1e-12)
    model.fit(planted_keep.astype(np.float64), noisy.outputs[:, 3].astype(np.float64))
    _close(found.weights[3], model.coef_)
    assert found.quality["correlation"].isna().all()
    assert found.quality["r2"].isna().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
@pytest.mark.parametrize("method", ["ridge", "ols", "lasso"])
def test_a_gpu_gives_the_same(noisy: CampaignStore, method: Any) -> None:
    expected, found = coar.fit(noisy, method=method), coar.fit(noisy, method=method, device="cuda")
    _close(found.weights[:], expected.weights[:], 1e-6)
    _close(found.stderr[:], expected.stderr[:], 1e-6)
    np.testing.assert_allclose(found.quality, expected.quality, rtol=1e-5)


@pytest.mark.parametrize("rows", [200, 20], ids=["primal", "dual"])
@pytest.mark.parametrize("method", ["ridge", "lasso"])
def test_torch_gives_the_same(
    write_campaign: WriteCampaign,
    noisy: CampaignStore,
    planted_keep: Keep,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    method: Any,
) -> None:
    """What a CUDA device computes, computed by torch on the CPU."""
    keep = np.concatenate([planted_keep, planted_keep[:, ::-1]], axis=1)[:rows] if rows == 20 else planted_keep
    campaign = write_campaign(keep, noisy.outputs[:rows])
    expected = coar.fit(campaign, method=method)
    monkeypatch.setattr("coar.estimators.regression.fit.arrays_on", lambda device: TorchArrays(torch.device(device)))
    found = coar.fit(campaign, method=method)
    _close(found.weights[:], expected.weights[:], 1e-6)
    _close(found.stderr[:], expected.stderr[:], 1e-6)
    np.testing.assert_allclose(found.quality, expected.quality, rtol=1e-4)
