"""The one layer that a method edits: which are refused, in which words, and that equal pairs give equal bits."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from ablate import ComponentIndex
from coar.editing.methods.pairs import Pairs
from coar.editing.where.blocks import Block, find_block
from coar.editing.where.layer import place_of
from coar.errors import EditError


def _cnn(groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=groups), nn.ReLU(), nn.Conv2d(4, 6, (2, 3)), nn.Flatten(), nn.Linear(6, 2)
    ).eval()


def test_place_of_a_convolution() -> None:
    model = _cnn()
    whole = ComponentIndex.from_model(model).where(module="2")
    place = place_of(model, whole.index.select(whole.ids[2:4]), "It", None)
    assert (place.layer, place.parameter, place.kernel) == ("2", "2.weight", (2, 3))
    assert place.rows.tolist() == [False, False, True, True, False, False]
    assert place.middle == ((0, 1), (1, 1))
    assert place.every_tap == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    assert place.block == Block("2", ("2",))


def test_around_allows_any_layer_of_a_block() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    inside = ComponentIndex.from_model(model).where(module="layer4.1.conv1")
    assert place_of(model, inside, "It", "layer4.1").block.modules == ("layer4.1",)
    assert place_of(model, inside, "It", "layer4.1.conv1").block.modules == ("layer4.1.conv1",)
    with pytest.raises(EditError) as refused:
        place_of(model, inside, "It", None)
    assert str(refused.value) == (
        "It edits the last layer of a residual branch, 'layer4.1.conv1' lies within 'layer4.1'. Select "
        "'layer4.1.conv2'; or pass around='layer4.1' to edit this one for the value of the block, "
        "around='layer4.1.conv1' for its own."
    )
    shortcut = ComponentIndex.from_model(model).where(module="layer4.0.downsample.0")
    with pytest.raises(EditError, match=r"'layer4\.0\.downsample\.0' lies within 'layer4\.0'"):
        place_of(model, shortcut, "It", None)
    vit = timm.create_model("test_vit", img_size=32)
    with pytest.raises(EditError, match=r"Select 'blocks\.1\.attn\.proj' or 'blocks\.1\.mlp\.fc2'; or pass"):
        place_of(vit, ComponentIndex.from_model(vit).where(module="blocks.1.mlp.fc1"), "It", None)


def test_refused() -> None:
    grouped = _cnn(2)
    with pytest.raises(EditError) as groups:
        place_of(grouped, ComponentIndex.from_model(grouped).where(module="0"), "It", None)
    assert str(groups.value) == (
        "It edits no grouped convolution: '0' has groups=2, so that its filters read different channels. Select an "
        "ordinary convolution or a linear layer."
    )
    vit = timm.create_model("test_vit", img_size=32)
    columns = ComponentIndex.from_model(vit, ["ffn_out"]).where(module="blocks.1.mlp.fc2")
    with pytest.raises(EditError) as parts:
        place_of(vit, columns.index.select(columns.ids[:5]), "It", None)
    assert str(parts.value) == (
        "It edits whole rows of a weight, the selection covers parts of rows of 'blocks.1.mlp.fc2.weight'. Select "
        "components of kind conv_filter or linear_neuron."
    )
    with pytest.raises(EditError, match=r"^It edits one layer, the selection lies in 2: 0, 2"):
        place_of(_cnn(), ComponentIndex.from_model(_cnn()).everything(), "It", None)


def test_equal_pairs_have_equal_values_bit_for_bit() -> None:
    model = torchvision.models.resnet18(num_classes=3).eval().requires_grad_(False)
    inputs = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(model, find_block(model, "layer4.1.conv2"), inputs, inputs.clone(), 2)
    model.get_parameter("layer4.1.conv2.weight").requires_grad_(True)
    for frozen in (True, False):
        values = list(pairs.values(frozen))
        assert [len(value) for value, _ in values] == [2, 2, 1]
        assert all(torch.equal(value, target) for value, target in values)
    assert pairs.examples == 5
    assert pairs.value_shape() == (512, 1, 1)


def test_values_that_are_not_finite() -> None:
    model = _cnn().requires_grad_(False)
    inputs = torch.randn(2, 4, 4, 5)
    broken = inputs.clone()
    broken[1, 0, 0, 0] = float("inf")
    with pytest.raises(EditError) as refused:
        Pairs(model, find_block(model, "0"), inputs, broken, 1)
    assert str(refused.value) == "'1' gives NaN or infinite values for the originals."
