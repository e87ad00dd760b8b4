"""Directions of a concept: the specification's example, invariances, masks on every grid, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coar.editing.methods.directions import along, coordinates, key_directions, key_weights, pooled
from coar.editing.methods.second_moment import SecondMoment
from coar.errors import EditError


def _moment(*diagonal: float) -> SecondMoment:
    return SecondMoment(torch.diag(torch.tensor(diagonal, dtype=torch.float64)), 1)


def _random(seed: int, keys: int = 20, channels: int = 6) -> tuple[Tensor, Tensor, SecondMoment]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(200, channels, generator=generator, dtype=torch.float64)
    scaled = base * torch.logspace(0, 1, channels)
    rows = torch.randn(keys, channels, generator=generator, dtype=torch.float64) + 1
    return rows, torch.rand(keys, generator=generator) + 0.1, SecondMoment(scaled.T @ scaled / 200, 200)


def test_the_worked_example() -> None:
    found, floored = key_directions(torch.tensor([[2.0, 1.0]]), torch.ones(1), _moment(4, 1), 1)
    assert torch.allclose(found, torch.tensor([[0.4472, 0.8944]], dtype=torch.float64), atol=1e-4)
    assert floored == 0


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("how", ["whitened", "raw_eig"])
def test_rows_are_orthonormal_and_scales_do_not_matter(rank: int, how: str) -> None:
    keys, weights, moment = _random(0)
    directions, _ = key_directions(keys, weights, moment, rank, how)  # type: ignore[arg-type]
    assert torch.allclose(directions @ directions.T, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    for again in (
        key_directions(keys, weights, SecondMoment(moment.matrix * 9, 200), rank, how)[0],  # type: ignore[arg-type]
        key_directions(keys, weights * 0.3, moment, rank, how)[0],  # type: ignore[arg-type]
    ):
        assert torch.allclose(again, directions, atol=1e-8)


def test_paper_and_code_agree_for_one_key_and_parallel_keys_only() -> None:
    keys, _, moment = _random(1)
    for some in (keys[:1], keys[:1] * torch.tensor([[1.0], [2.0], [-0.5]])):
        ones = torch.ones(len(some))
        paper, code = (key_directions(some, ones, moment, 1, how)[0] for how in ("raw_eig", "whitened"))
        assert abs(float(paper @ code.T)) == pytest.approx(1, abs=1e-6)
    apart = torch.tensor([[5.0, 0.0], [0.0, 1.0]])  # the first is the larger, the second the more unusual
    paper, code = (key_directions(apart, torch.ones(2), _moment(100, 1), 1, how)[0] for how in ("raw_eig", "whitened"))
    assert paper.abs().tolist() == [[1, 0]]
    assert code.abs().tolist() == [[0, 1]]


def test_against_the_definition_step_by_step() -> None:
    keys, weights, moment = _random(2)
    values, vectors = torch.linalg.eigh(moment.matrix)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    rows = weights[:, None] * (keys @ root)
    gram = rows.T @ rows
    top = torch.linalg.eigh(gram)[1].flip(1)[:, :2].T  # right singular vectors, largest first
    expected = torch.linalg.qr((top @ root).T)[0].T
    found, _ = key_directions(keys, weights, moment, 2)
    assert torch.allclose((found * expected).sum(1).abs(), torch.ones(2, dtype=torch.float64), atol=1e-9)
    assert bool((found @ rows.sum(0) >= 0).all())


def test_positions_outside_of_the_mask_do_not_count() -> None:
    keys, weights, moment = _random(3)
    weights[10:] = 0
    inside, _ = key_directions(keys[:10], weights[:10], moment, 1)
    keys[15] = float("nan")
    assert torch.equal(key_directions(keys, weights, moment, 1)[0], inside)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1, 1), (5, 6, 3, 3)])
def test_projection(shape: tuple[int, ...]) -> None:
    keys, weights, moment = _random(4)
    directions, _ = key_directions(keys, weights, moment, 2)
    change = torch.randn(shape, dtype=torch.float64)
    once = along(change, directions)
    assert torch.allclose(along(once, directions), once, atol=1e-12)
    left = coordinates(change, directions)
    assert left.shape == (5, 9 if shape[2:] == (3, 3) else 1, 2)
    assert torch.allclose(torch.einsum("otr,ri->oit", left, directions).reshape(shape), once)
    off = directions.clone()
    off[1] += 0.1 * off[0]
    with pytest.raises(EditError) as refused:
        along(change, off)
    assert str(refused.value) == (
        "The directions are not orthonormal (D Dᵀ is not the identity): expected the rows of torch.linalg.qr(...)."
    )


def test_masks_on_grids() -> None:
    masks = torch.zeros(1, 224, 224)
    masks[0, :16, :32] = 1
    grid = pooled(masks, (7, 7))
    assert float(grid[0, 0, 0]) == 0.5
    assert float(grid.sum()) == 0.5
    assert torch.equal(grid, torch.nn.functional.avg_pool2d(masks, 32))
    tokens = pooled(masks, (50,))
    assert tokens.shape == (1, 50)
    assert float(tokens[0, 0]) == 0  # the class token
    assert torch.equal(tokens[:, 1:].reshape(1, 7, 7), grid)
    assert torch.equal(pooled(masks, (49,)).reshape(1, 7, 7), grid)
    assert torch.equal(pooled(masks, (54,), prefix=5)[:, 5:].reshape(1, 7, 7), grid)
    assert float(pooled(masks, ())) == pytest.approx(512 / 224**2)
    assert pooled(torch.ones(1, 32, 64), (1 + 2 * 4,)).tolist() == [[0.0] + [1.0] * 8]


def test_masks_at_the_keys_are_floating_point() -> None:
    """Antialiased and bilinear, as the published code resizes, without its rounding to 0 or 1."""
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:16, 8:16] = 1
    conv, linear = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)
    weights = key_weights(masks, conv, (8, 8), None)
    assert weights.shape == (1, 8, 8)
    assert int((weights > 0).sum()) == 16  # two cells of the concept, and one beside on each side
    assert int((pooled(masks, (8, 8)) > 0).sum()) == 4
    assert 0 < float(weights[0, 1, 1]) < float(weights[0, 2, 2]) < 1
    assert key_weights(masks, conv, (4, 6), None).shape == (1, 4, 6)  # rows before columns
    assert torch.equal(key_weights(masks, linear, (17,), None), pooled(masks, (17,)))


def test_refused() -> None:
    keys, weights, moment = _random(5, keys=3)
    with pytest.raises(EditError) as empty:
        key_directions(keys, torch.zeros(3), moment, 1)
    assert str(empty.value) == (
        "The masks are zero at every position of this layer: there is no key to take a direction from. Give masks of a "
        "larger region, or select an earlier layer, which has more positions."
    )
    with pytest.raises(EditError) as many:
        key_directions(keys, weights, moment, 4)
    assert str(many.value) == (
        "rank is 4, but the concept has 3 keys, of which 3 are independent: expected a rank of 1 to 3."
    )
    with pytest.raises(EditError, match="3 keys, of which 1 are independent: expected a rank of 1 to 1"):
        key_directions(keys[:1].expand(3, -1), weights, moment, 2)
    with pytest.raises(EditError) as dead:
        key_directions(torch.zeros(3, 6), weights, moment, 1)
    assert str(dead.value) == ("All 3 keys of the concept are zero: the layer does not see it. Select another layer.")
    with pytest.raises(EditError) as infinite:
        key_directions(keys / 0, weights, moment, 1)
    assert str(infinite.value) == "The layer reads NaN or infinite values for the inputs."
    with pytest.raises(EditError) as axes:
        pooled(torch.ones(1, 32, 32), (4, 4, 4))
    assert str(axes.value) == "Masks have 2 axes, the layer has 3 axes of positions: they cannot be told for it."
    with pytest.raises(EditError) as grid:
        pooled(torch.ones(1, 32, 32), (18,), prefix=1)
    assert str(grid.value) == (
        "18 tokens are no grid of patches of a 32 x 32 image behind 1 others: masks cannot be told for them."
    )
