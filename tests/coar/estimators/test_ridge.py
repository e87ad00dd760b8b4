"""Penalties are compared in narrow numbers first: the bound on what that loses holds, and the choice is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from coar.estimators.regression.arrays import Arrays, NumpyArrays, TorchArrays
from coar.estimators.regression.fit import RIDGE_GRID
from coar.estimators.regression.packed import PackedKeep
from coar.estimators.regression.ridge import Penalties, choose, decompose, leave_one_out
from stores.format.keepbits import pack_keep

Floats = npt.NDArray[np.float64]


def _slow_errors(keep: Floats, outputs: Floats, ridges: Floats) -> Floats:
    """The norms of leave-one-out errors (ridges, examples), from one hat matrix per penalty."""
    K, Y = keep - keep.mean(axis=0), outputs
    hats = [K @ np.linalg.solve(K.T @ K + ridge * np.eye(K.shape[1]), K.T) + 1 / len(K) for ridge in ridges]
    return np.array([np.linalg.norm((Y - H @ Y) / (1 - np.diag(H))[:, None], axis=0) for H in hats])


@pytest.mark.parametrize("arrays", [NumpyArrays(), TorchArrays(torch.device("cpu"))], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("rows", "components"), [(300, 40), (110, 100), (100, 100), (60, 150), (900, 30)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("unit", [1.0, 1e-25, 1e25])
def test_the_bound_holds_and_the_choice_is_exact(
    draw_keep: Callable[..., npt.NDArray[np.bool_]], arrays: Arrays, rows: int, components: int, unit: float
) -> None:
    keep = draw_keep(rows, components)
    generator = np.random.default_rng(components)
    noise = generator.normal(size=(rows, 60)) * np.logspace(-3, 2, 60)
    outputs: Any = keep @ generator.normal(size=(components, 60)) + noise
    outputs -= outputs.mean(axis=0)
    spectrum = decompose(PackedKeep(pack_keep(keep), components), arrays)
    penalties = Penalties.of(spectrum, RIDGE_GRID * spectrum.scale)
    slow = _slow_errors(keep.astype(np.float64), outputs, penalties.ridges)
    expected = len(slow) - 1 - slow[::-1].argmin(axis=0)
    assert len(set(expected)) > 5, "this test should see several penalties"
    placed = arrays.put(outputs * unit)
    coefficients = spectrum.rotate(placed)
    norm, bound = leave_one_out(spectrum, penalties, placed, coefficients)
    assert (np.abs(norm - slow / np.linalg.norm(outputs, axis=0)) <= bound).all()
    assert np.median(bound / norm) < 1e-3, "the bound should decide most"
    np.testing.assert_array_equal(choose(spectrum, penalties, placed, coefficients), expected)
