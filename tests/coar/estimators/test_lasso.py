"""The lasso equals scikit-learn's at the penalty it chose, chooses as a slow search does, and knows its errors."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, LinearRegression

import coar
from coar.estimators.regression import lasso
from coar.estimators.regression.lasso import PATH
from stores import CampaignStore

Keep = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
WriteCampaign = Callable[..., CampaignStore]


def _sparse_outputs(keep: Keep, examples: int, seed: int) -> Floats:
    """Outputs of which a third of the components matter, with noise and an offset."""
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=(keep.shape[1], examples)) * (generator.random((keep.shape[1], examples)) < 0.33)
    noise = generator.normal(0, 0.3, (len(keep), examples))
    return np.asarray(keep @ weights + noise + generator.normal(0, 20, examples))


def _rows(campaign: CampaignStore) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Returns keep (as 0 and 1), outputs and last digit of the rows that are not held out."""
    digit = np.arange(campaign.rows) % 10
    fitted = digit != 9
    return campaign.keep[:][fitted].astype(float), campaign.outputs[:][fitted].astype(float), digit[fitted]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    components=st.integers(1, 50),
    examples=st.integers(1, 4),
    rows=st.integers(30, 70),
)
def test_equals_scikit_learn(
    write_campaign: WriteCampaign,
    draw_keep: Callable[..., Keep],
    seed: int,
    components: int,
    examples: int,
    rows: int,
) -> None:
    keep = draw_keep(rows, components, 0.3, seed)
    campaign = write_campaign(keep, _sparse_outputs(keep, examples, seed))
    K, Y, _ = _rows(campaign)
    found = coar.fit(campaign, method="lasso")
    for e in range(examples):
        model = Lasso(alpha=found.quality["lasso"][e], tol=1e-13, max_iter=1_000_000).fit(K, Y[:, e])
        scale = np.abs(model.coef_).max() + 1e-6
        np.testing.assert_allclose(found.weights[e], model.coef_, rtol=1e-5, atol=1e-5 * scale)
        np.testing.assert_allclose(found.bias[e], model.intercept_, rtol=1e-5, atol=1e-5 * scale)
        assert found.quality["nonzero"][e] == np.count_nonzero(found.weights[e])


@pytest.mark.parametrize("components", [12, 60], ids=["more rows than components", "fewer rows than components"])
def test_the_penalty_is_that_of_a_slow_search(
    write_campaign: WriteCampaign, draw_keep: Callable[..., Keep], components: int
) -> None:
    keep = draw_keep(60, components)
    campaign = write_campaign(keep, _sparse_outputs(keep, 6, 3))
    K, Y, digit = _rows(campaign)
    tried, judging = digit != 8, digit == 8
    expected = []
    for y in Y.T:
        centred = K[tried] - K[tried].mean(axis=0)
        path = PATH * np.abs(centred.T @ (y[tried] - y[tried].mean())).max() / tried.sum()
        errors: list[float] = []
        for penalty in path:  # ends when the error has not improved for four penalties
            model = Lasso(alpha=penalty, tol=1e-10, max_iter=1_000_000).fit(K[tried], y[tried])
            errors.append(float(((model.predict(K[judging]) - y[judging]) ** 2).sum()))
            if len(errors) - 1 - int(np.argmin(errors)) == 4:
                break
        expected.append(float(path[np.argmin(errors)]))
    found = coar.fit(campaign, method="lasso").quality["lasso"]
    assert len(set(np.round(found / Y.std(axis=0), 4))) > 1, "this test should see several penalties"
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_errors_are_those_of_least_squares_on_the_components_with_weights(noisy: CampaignStore) -> None:
    found = coar.fit(noisy, method="lasso")
    K, Y, _ = _rows(noisy)
    for e in range(3):
        active = np.flatnonzero(found.weights[e])
        w = found.weights[e].astype(float)
        residuals = Y[:, e] - K @ w
        residuals -= residuals.mean()
        sd = np.sqrt((residuals**2).sum() / (len(K) - 1 - len(active)))
        np.testing.assert_allclose(found.quality["residual_sd"][e], sd, rtol=1e-5)
        for j in range(K.shape[1]):
            columns = sorted({*active.tolist(), j})
            centred = K[:, columns] - K[:, columns].mean(axis=0)
            inverse = np.linalg.inv(centred.T @ centred)
            expected = sd * np.sqrt(np.diag(inverse)[columns.index(j)])
            np.testing.assert_allclose(found.stderr[e, j], expected, rtol=1e-5)


def test_a_sparse_truth_is_found_sparse(write_campaign: WriteCampaign, draw_keep: Callable[..., Keep]) -> None:
    """Forty components, of which three matter: half the rows that least squares would need suffice."""
    keep = draw_keep(60, 80)
    outputs = keep[:, [3, 40, 77]] @ np.array([[2.0], [-3.0], [4.0]]) + np.random.default_rng(0).normal(0, 0.1, (60, 1))
    found = coar.fit(write_campaign(keep, outputs), method="lasso")
    assert found.top(0, 3)["component"].tolist() == [77, 40, 3]
    np.testing.assert_allclose(found.weights[0, [3, 40, 77]], [2, -3, 4], atol=0.3)
    assert found.quality["nonzero"][0] < 30
    assert found.quality["correlation"][0] > 0.95


def test_constant_outputs_and_components_never_ablated(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    keep = planted_keep.copy()
    keep[:, 5] = True
    outputs = np.stack([np.full(200, 0.1), keep[:, 4] * 2.0], axis=1)
    found = coar.fit(write_campaign(keep, outputs), method="lasso")
    assert not found.weights[0].any()
    assert not found.stderr[0].any()
    assert found.bias[0] == np.float32(0.1)
    assert np.isnan(found.quality["correlation"][0])
    assert found.weights[1, 5] == found.stderr[1, 5] == 0
    np.testing.assert_allclose(found.weights[1, 4], 2, rtol=0.02)


def test_twins_that_the_rows_cannot_tell_apart(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    """Their sum is known, the error of the one without a weight is large, and nothing is infinite."""
    keep = planted_keep.copy()
    keep[:, 7] = keep[:, 6]
    outputs = keep[:, 6] * 2.0 + keep @ np.linspace(0, 1, 12)
    found = coar.fit(write_campaign(keep, outputs[:, None]), method="lasso")
    np.testing.assert_allclose(found.weights[0, 6] + found.weights[0, 7], 2 + 13 / 11, rtol=0.02)
    assert np.isfinite(found.stderr[0]).all()
    assert sorted(found.weights[0, 6:8] == 0) == [False, True]  # one carries the weight of both
    left_out = 6 if found.weights[0, 6] == 0 else 7
    assert found.stderr[0, left_out] > 100 * found.stderr[0, 3]  # beside it, the other's is anybody's guess


def test_a_descent_that_does_not_converge(noisy: CampaignStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*arguments: Any) -> npt.NDArray[np.bool_]:
        return np.arange(30) > 3

    monkeypatch.setattr(lasso, "_solve_all", stuck)
    with pytest.raises(coar.FitError) as refused:
        coar.fit(noisy, method="lasso")
    assert str(refused.value) == (
        "The lasso did not converge within 20,000 sweeps for 4 of 30 examples: some components are ablated in almost "
        "the same rows. Run more rows, or use method='ridge'."
    )


def test_without_a_place_for_machine_code_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = numba.njit

    def nowhere(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    found = lasso._compiled(parallel=False)(lambda x: x + 1)
    assert found(1) == 2
    assert found.stats.cache_path is None


@pytest.mark.slow
def test_importing_and_running_warn_of_nothing(tmp_path: Path) -> None:
    program = (
        "import numpy as np; from coar.estimators.regression.lasso import _find_active;"
        "print(_find_active(np.array([0.0, 2.0]), np.zeros(2, dtype=np.intp)))"
    )
    root = Path(importlib.import_module("coar").__file__ or "").parent.parent
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_least_squares_is_the_limit_of_no_penalty(write_campaign: WriteCampaign, planted_keep: Keep) -> None:
    """Without noise the smallest penalty of the path wins; its weights are nearly those of least squares."""
    outputs = planted_keep @ np.linspace(1, 2, 12)
    found = coar.fit(write_campaign(planted_keep, outputs[:, None]), method="lasso")
    model = LinearRegression().fit(planted_keep, outputs)
    np.testing.assert_allclose(found.weights[0], model.coef_, atol=0.01)


KEPT_THREADS = """
import numpy as np, torch
from coar.estimators.regression.lasso import _torch_threads_kept, _solve_all
torch.set_num_threads(1)
with _torch_threads_kept():
    gram, cross = np.eye(3), np.ones((4, 3))
    done = _solve_all(gram, cross, np.full(4, 0.1), 1e-7, np.zeros((4, 3)), np.empty((4, 2, 3)),
                      np.empty((4, 3), dtype=np.intp))
assert done.all()
print(torch.get_num_threads())
"""


def test_torch_keeps_its_number_of_threads() -> None:
    """numba's first parallel loop of a process sets the number of threads of all who use OpenMP."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", KEPT_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=True)
    assert done.stdout == "1\n"
