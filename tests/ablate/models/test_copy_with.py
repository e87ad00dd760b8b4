"""A copy with other weights is a model of its own, in which what shared memory shares it still."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablate.models.copies import copy_with


class Tied(nn.Module):
    """One weight as two parameters of one memory, a part of it as a third, and as a buffer."""

    row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4, bias=False)
        self.two = nn.Linear(3, 4, bias=False)
        self.two.weight.data = self.one.weight.data
        self.part = nn.Parameter(self.one.weight.data[1:3])
        self.register_buffer("row", self.one.weight.data[0])
        self.other = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(x) + self.other(x)
        return out


@pytest.fixture
def tied() -> Tied:
    return Tied().eval()


def _memory(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
@pytest.mark.parametrize("share", [False, True])
def test_a_value_shows_under_every_name(tied: Tied, name: str, share: bool, untouched: Any) -> None:
    value = torch.arange(12.0).reshape(4, 3)
    with untouched(tied):
        copied = copy_with(tied, {name: value}, share)
    assert isinstance(copied, Tied)
    for found, expected in (
        (copied.one.weight, value),
        (copied.two.weight, value),
        (copied.part, value[1:3]),
        (copied.row, value[0]),
    ):
        assert torch.equal(found, expected)
    assert len({copied.one.weight.data_ptr(), copied.two.weight.data_ptr(), copied.row.data_ptr()}) == 1
    with torch.no_grad():
        copied.two.weight.add_(1)
    assert torch.equal(copied.one.weight, value + 1)


def test_nothing_is_shared_unless_asked(tied: Tied) -> None:
    assert not _memory(copy_with(tied, {})) & _memory(tied)
    shared = copy_with(tied, {"other.weight": torch.zeros(4, 3)}, share=True)
    names = [name for name, p in shared.named_parameters() if p.untyped_storage().data_ptr() in _memory(tied)]
    assert names == ["part", "one.weight", "two.weight", "other.bias"]


def test_training_the_copy_leaves_the_model(tied: Tied, untouched: Any) -> None:
    copied = copy_with(tied, {"other.bias": torch.ones(4)})
    with untouched(tied):
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        copied(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        copied.load_state_dict({name: torch.zeros_like(value) for name, value in copied.state_dict().items()})


def test_flags_and_one_parameter_in_two_places_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    for share in (False, True):
        copied = copy_with(model, {"0.weight": torch.zeros(3, 3)}, share)
        assert copied.get_parameter("1.weight") is copied.get_parameter("0.weight") is not model[0].weight
        assert not copied.get_parameter("1.weight").any()
        assert [parameter.requires_grad for parameter in copied.parameters()] == [True, False, True]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("made_in_it", "copied_in_it"), [(False, True), (True, False), (True, True)])
def test_a_copy_made_in_inference_mode_can_be_trained(share: bool, made_in_it: bool, copied_in_it: bool) -> None:
    with torch.inference_mode(made_in_it):
        model = Tied()
    with torch.inference_mode(copied_in_it):
        copied = copy_with(model, {"other.weight": torch.ones(4, 3)}, share)
    copied(torch.ones(2, 3)).sum().backward()
    assert copied.get_parameter("other.weight").grad is not None
    assert copied.get_parameter("one.weight").data_ptr() == copied.get_parameter("two.weight").data_ptr()
