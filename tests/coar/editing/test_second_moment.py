"""Second moments of keys: exact values, streaming, centering, eigenvalues near zero, and what the cache is keyed by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ablate import Examples
from coar.editing.methods.second_moment import SecondMoment, forget_second_moments, second_moment
from coar.editing.where.blocks import layer_keys
from coar.errors import EditError


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    forget_second_moments()
    yield
    forget_second_moments()


def _cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(45, 2)
    ).eval()


def _examples(count: int = 7, seed: int = 1) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(count, 3, 8, 8, generator=generator), torch.zeros(count, dtype=torch.int64))


def _linear(inputs: Tensor) -> tuple[nn.Module, Examples]:
    model = nn.Sequential(nn.Linear(inputs.shape[-1], 2)).eval()
    return model, Examples(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def test_constant_keys_give_c_c_transposed() -> None:
    c = torch.tensor([1.0, -2.0, 3.0])
    model, examples = _linear(c.expand(6, 3).clone())
    expected = torch.outer(c, c).double()
    assert torch.equal(second_moment(model, "0", examples).matrix, expected)
    assert torch.equal(second_moment(model, "0", examples, center=True).matrix, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_it_is_the_mean_over_all_positions_of_all_examples(layer: str, batch_size: int) -> None:
    model, examples = _cnn(), _examples()
    keys = layer_keys(model, layer, examples.inputs())
    rows = keys.reshape(-1, keys.shape[-1]).double()
    found = second_moment(model, layer, examples, batch_size=batch_size)
    assert found.positions == len(rows) == {"0": 7 * 64, "2": 7 * 9, "4": 7}[layer]
    assert found.matrix.dtype == torch.float64
    assert torch.allclose(found.matrix, rows.T @ rows / len(rows), atol=1e-6)
    centered = second_moment(model, layer, examples, batch_size=batch_size, center=True)
    assert torch.allclose(centered.matrix, torch.cov(rows.T, correction=0), atol=1e-6)


def test_a_dead_channel_does_not_destroy_the_others() -> None:
    """The published code turns diag(4, 1) beside a zero row into correlations, of which nothing is left."""
    moment = SecondMoment(torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)), 1)
    root, floored = moment.power(-0.5)
    assert floored == 1
    assert torch.allclose(root, torch.diag(torch.tensor([0.5, 1.0, (4e-6) ** -0.5], dtype=torch.float64)))
    assert moment.power(-0.5, floor=1e-3)[0][2, 2] == pytest.approx((4e-3) ** -0.5)
    whole, none = SecondMoment(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), 1).power(-1)
    assert none == 0
    assert torch.allclose(whole, torch.diag(torch.tensor([0.25, 1.0], dtype=torch.float64)))


def _moments(seed: int) -> tuple[SecondMoment, SecondMoment, Tensor]:
    torch.manual_seed(seed)
    model, examples = _linear(torch.randn(400, 6) @ torch.randn(6, 6) + 2 * torch.randn(6))
    mean = examples.inputs().double().mean(0)
    return second_moment(model, "0", examples), second_moment(model, "0", examples, center=True), mean


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_centering_does_to_a_direction(seed: int) -> None:
    raw, centered, mean = _moments(seed)
    inverse, covariance = raw.power(-1, 1e-12)[0], centered.power(-1, 1e-12)[0]
    key = torch.randn(6, dtype=torch.float64)
    pull = covariance @ mean
    expected = covariance @ key - pull * (mean @ covariance @ key) / (1 + mean @ pull)
    assert torch.allclose(inverse @ key, expected, rtol=1e-6, atol=1e-9)
    ratio = inverse @ mean / pull  # along the mean only the length changes
    assert torch.allclose(ratio, (1 / (1 + mean @ pull)).expand(6), rtol=1e-6)
    flat = key - mean * (mean @ covariance @ key / (mean @ pull))
    assert torch.allclose(inverse @ flat, covariance @ flat, rtol=1e-6, atol=1e-9)  # no part along it: nothing changes


def test_centering_turns_a_generic_direction() -> None:
    """Covariance I, mean (3, 0): C = diag(10, 1), so that (2, 1) becomes (0.2, 1) instead of (2, 1)."""
    model, examples = _linear(torch.tensor([[4.0, 1], [4, -1], [2, 1], [2, -1]]))
    raw, centered = (second_moment(model, "0", examples, center=center) for center in (False, True))
    key = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert torch.allclose(raw.power(-1)[0] @ key, torch.tensor([0.2, 1.0], dtype=torch.float64))
    assert torch.allclose(centered.power(-1)[0] @ key, key)
    cosine = torch.cosine_similarity(raw.power(-1)[0] @ key, key, dim=0)
    assert float(cosine) == pytest.approx(1.4 / (5 * 1.04) ** 0.5)  # 0.61


def _counted(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_it_is_computed_once_per_content() -> None:
    model, examples = _cnn(), _examples()
    calls = _counted(model)
    first = second_moment(model, "2", examples)
    assert len(calls) == 1
    assert second_moment(model, "2", _examples()) is first  # the same content in another object
    assert second_moment(_cnn(), "2", examples) is first
    assert len(calls) == 1
    assert not torch.equal(second_moment(model, "2", examples, center=True).matrix, first.matrix)
    assert not torch.equal(second_moment(model, "2", _examples(seed=2)).matrix, first.matrix)
    assert second_moment(model, "0", examples).matrix.shape == (3, 3)
    assert len(calls) == 4
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    assert not torch.equal(second_moment(model, "2", examples).matrix, first.matrix)
    assert len(calls) == 5


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    model, examples = _cnn(), _examples()
    first = second_moment(model, "2", examples, cache=tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    forget_second_moments()
    calls = _counted(model)
    again = second_moment(model, "2", examples, cache=tmp_path / "new")
    assert not calls
    assert torch.equal(again.matrix, first.matrix)
    assert (again.positions, again.center) == (first.positions, False)
    second_moment(model, "0", examples, cache=tmp_path / "new")
    other = next(p for p in (tmp_path / "new").iterdir() if p != path)
    other.replace(path)
    forget_second_moments()
    with pytest.raises(EditError) as wrong:
        second_moment(model, "2", examples, cache=tmp_path / "new")
    assert str(wrong.value) == (
        f"The second moment at {path} is of something else, or holds values that are not finite. Delete the file."
    )
    path.write_bytes(b"nothing")
    with pytest.raises(
        EditError, match=r"^The second moment at .*\.safetensors cannot be read: .*\. Delete the file\.$"
    ):
        second_moment(model, "2", examples, cache=tmp_path / "new")
    path.unlink()
    assert torch.equal(second_moment(model, "2", examples, cache=tmp_path / "new").matrix, first.matrix)


def test_keys_that_tell_nothing() -> None:
    model, examples = _linear(torch.zeros(3, 4))
    with pytest.raises(EditError) as zero:
        second_moment(model, "0", examples).power(-0.5)
    assert str(zero.value) == (
        "The second moment is zero: the layer reads nothing but zeros on the reference examples. Select another layer, "
        "or give other reference examples."
    )
    inputs = torch.zeros(3, 4)
    inputs[2, 1] = float("nan")
    model, examples = _linear(inputs)
    with pytest.raises(EditError) as missing:
        second_moment(model, "0", examples, batch_size=2)
    assert str(missing.value) == "Layer '0' reads NaN or infinite values for reference example '2'."


def test_a_flipped_bit_of_its_file_is_noticed(tmp_path: Path) -> None:
    model, examples = _linear(torch.randn(6, 3))
    second_moment(model, "0", examples, cache=tmp_path)
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    forget_second_moments()
    with pytest.raises(EditError, match=r"cannot be read: what it holds does not have the checksum .*Delete the file"):
        second_moment(model, "0", examples, cache=tmp_path)
