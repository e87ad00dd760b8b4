"""Cosines are scikit-learn's; projections keep them, whatever the vectors look like, within the stated error."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from coar.attributions import similarity
from coar.attributions.similarity import cosines, projected, projection_error, shortlist_size

Floats = npt.NDArray[np.float32]

needs_fast_jl = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fast_jl") is None,
    reason="needs a CUDA device and the package fast-jl",
)


def _vectors(examples: int, components: int, power: int, seed: int) -> Floats:
    """Vectors around a common direction: with a high power, a few of their numbers are most of their length."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=components) ** power
    return (
        generator.normal(size=(examples, 1)) * common + generator.normal(size=(examples, components)) ** power
    ).astype(np.float32)


def test_cosines_by_hand() -> None:
    weights = np.array([[3, 4], [0, 0], [-4, 3], [-6, -8]], dtype=np.float32)
    assert cosines(weights, np.array([3, 4], dtype=np.float32)).tolist() == [1, 0, 0, -1]
    assert cosines(weights, np.zeros(2, dtype=np.float32)).tolist() == [0, 0, 0, 0]


def test_cosines_of_weights_too_small_or_large_to_be_squared_in_float32() -> None:
    weights = np.array([[1e-30, 1e-30], [1e30, 0]], dtype=np.float32)
    np.testing.assert_allclose(cosines(weights, weights[0]), [1, 0.5**0.5], rtol=1e-6)


@settings(max_examples=12)
@given(st.sampled_from([1, 3, 5]), st.integers(0, 1000))
def test_inner_products_of_projections_are_cosines_within_the_error(power: int, seed: int) -> None:
    weights = _vectors(30, 1500, power, seed)
    found = projected([weights[:13], weights[13:]], 30, 1500, seed=seed)
    assert found.shape == (30, 512)
    assert found.dtype == np.float32
    true = cosine_similarity(weights)
    errors = (found @ found.T - true)[np.triu_indices(30, 1)]
    allowed = ((1 - true**2) / np.sqrt(512))[np.triu_indices(30, 1)]
    assert np.sqrt((errors**2).mean()) <= 1.5 * np.sqrt((allowed**2).mean())
    assert (np.abs(errors) <= 6 * allowed + 0.01).all()
    assert (errors >= -1.5 * np.array([projection_error(c, 512) for c in true[np.triu_indices(30, 1)]])).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_projections_do_not_depend_on_blocks_and_leave_the_world_alone(untouched: Any) -> None:
    weights = _vectors(20, 60, 1, 0)
    weights[4] = 0
    with untouched():
        whole = projected([weights], 20, 60, dimensions=16)
    parts = projected((weights[i : i + 3] for i in range(0, 20, 3)), 20, 60, dimensions=16)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert (whole[4] == 0).all()
    assert not np.allclose(projected([weights], 20, 60, dimensions=16, seed=1), whole, atol=0.1)


def test_shortlist_size() -> None:
    assert [shortlist_size(k) for k in (1, 5, 100)] == [12, 20, 210]


def test_the_error_of_a_projected_cosine() -> None:
    assert projection_error(0.0, 400) == pytest.approx(0.2, rel=1e-3)
    assert projection_error(0.5, 400) == pytest.approx(0.15, rel=1e-3)
    assert projection_error(1.0, 400) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("dimensions", "cuda", "package", "usable"),
    [(512, True, True, True), (100, True, True, False), (512, False, True, False), (512, True, False, False)],
)
def test_when_fast_jl_is_used(
    dimensions: int, cuda: bool, package: bool, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(similarity, "FAST_JL", "json" if package else "no_package_of_this_name")
    assert similarity.can_use_fast_jl(dimensions) is usable


@pytest.mark.gpu
@needs_fast_jl
@pytest.mark.parametrize("examples", [1, 8, 9, 17, 40])
def test_fast_jl_keeps_cosines_as_the_gaussian_projection_does(examples: int) -> None:
    vectors = _vectors(examples, 3000, 3, 0)
    weights = vectors * np.logspace(-12, 12, examples, dtype=np.float32)[:, None]
    ways = (similarity.fast_jl_projection, similarity.gaussian_projection)
    fast, slow = (way(3000, 512, 0)(weights) for way in ways)
    assert fast.shape == slow.shape == (examples, 512)
    true = cosine_similarity(vectors)
    for found in (fast, slow):
        assert (np.abs(cosine_similarity(found) - true) <= 6 * (1 - true**2) / np.sqrt(512) + 0.01).all()


class Recorded:
    """Stands in for the package fast-jl: projects with the signs of a seeded matrix, in half precision as it does."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def project_rademacher_8(self, rows: torch.Tensor, dimensions: int, seed: int, tiles: int) -> torch.Tensor:
        assert tiles == similarity.FAST_JL_TILES
        assert rows.is_contiguous()
        self.calls.append((len(rows), dimensions, seed))
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (rows.shape[1], dimensions), generator=generator) * 2.0 - 1.0
        return rows.half().float() @ signs

    project_rademacher_16 = project_rademacher_32 = project_rademacher_8


def test_rows_of_any_size_survive_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is given, on the CPU: rows that would overflow or vanish in half precision."""
    stand_in = Recorded()
    to = torch.Tensor.to
    monkeypatch.setattr(importlib, "import_module", lambda _: stand_in)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to_what: self if "cuda" in to_what else to(self, *to_what))
    vectors = _vectors(20, 2000, 3, 0)
    vectors[7] = 0
    weights = vectors * np.logspace(-30, 30, 20, dtype=np.float32)[:, None]
    found = similarity.fast_jl_projection(2000, 512, 5)(weights)
    assert stand_in.calls == [(20, 512, 5)]
    assert np.isfinite(found).all()
    true = cosine_similarity(vectors)
    assert (np.abs(cosine_similarity(found) - true) <= 6 * (1 - true**2) / np.sqrt(512) + 0.01).all()
