"""Where methods edit unless told otherwise: by the order in which a forward pass uses layers, not of declaration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import coar
from coar.editing.where.defaults import by_use, last_feed_forward_blocks, last_layer
from coar.editing.where.layers import layers_of


class Declared(nn.Module):
    """Attributes in another order than their use; `training_only` is passed by in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second, self.first = nn.Linear(6, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(1, 4, 3)
        self.training_only = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.training:
            trained: Tensor = self.training_only(x).mean(dim=(2, 3))
            return trained
        logits: Tensor = self.head(self.second(x).relu().mean(dim=(2, 3)))
        return logits


class Asking(Declared):
    """The same, whose forward asks for a number: it cannot be followed without inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else -x)


class Blocks(nn.Module):
    """Four feed-forward networks, declared last to first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        for name in "dcba":
            self.add_module(name, nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in "abcd":
            x = x + self.get_submodule(name)(x)
        logits: Tensor = self.head(x)
        return logits


INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_last_layer_is_the_one_used_last() -> None:
    assert last_layer(Declared()).table()["module"].unique().tolist() == ["second"]
    assert by_use(Declared(), ["head", "training_only", "second", "first", "head"]) == ["first", "second", "head"]


def test_feed_forward_networks_are_counted_by_use() -> None:
    assert last_feed_forward_blocks(Blocks(), 2).table()["module"].unique().tolist() == ["c.0", "c.2", "b.0", "b.2"]


def test_layers_are_in_the_order_of_use() -> None:
    assert [place.layers for place in layers_of(Blocks(), ["ffn"])] == [("a",), ("b",), ("c",), ("d",)]
    assert [place.layers for place in layers_of(Declared(), ["module"])] == [("first",), ("second",)]


@pytest.mark.parametrize("model", [Declared(), Asking()])
def test_an_editor_trains_what_its_inputs_use(model: nn.Module) -> None:
    request = coar.Request(INPUTS, torch.tensor([0, 1, 2, 0]))
    edit = coar.get_editor("finetune", rate=1e-2, steps=2, scope="local").edit(model.eval(), request)
    assert edit.describe()["module"].unique().tolist() == ["second"]
    edit = coar.get_editor("finetune", rate=1e-2, steps=2).edit(model, request)
    table = edit.describe()
    assert table["module"].tolist() == ["second", "first"]
    assert (table["relative_change"] > 0).all()
