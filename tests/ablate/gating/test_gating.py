"""Literal ablation of a live model: what it writes, and that every bit comes back however the block ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.engine.gated_model import Speed
from ablate.gating.literal import attenuate, attenuated

Untouched = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_exactly_the_selected_slices_become_zero(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    before = _values(conv_net)
    selection = index.select([0, 3, 4, 9, 12, 17])
    with ablate.ablated(conv_net, selection) as model:
        assert model is conv_net
        for name, parameter in conv_net.named_parameters():
            expected = before[name].clone()
            for c in selection:
                if index[c].parameter == name:
                    expected[index[c].start : index[c].stop] = 0
            assert torch.equal(parameter, expected), name


def test_outputs_are_those_of_the_engine(
    index: ablate.ComponentIndex, conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    selection = index.everything().sample(5, seed=0)
    engine = ablate.Engine(conv_net, index, speed=Speed(fold=False, channels_last=False))
    with ablate.ablated(conv_net, selection), torch.no_grad():
        outputs = ablate.Margin()(conv_net(images), labels)
    assert torch.equal(engine.outputs(selection.keep()[None], images, labels)[0], outputs)


def test_every_bit_comes_back(index: ablate.ComponentIndex, conv_net: nn.Module, untouched: Untouched) -> None:
    with torch.no_grad():
        weight = conv_net.get_parameter("conv1.weight")
        weight[0, 0, 0] = torch.tensor([float("inf"), float("-inf"), -0.0])
        weight.view(torch.int32)[1, 0, 0, 0] = 0x7FC0_1234  # a NaN with a payload
        weight[2, 0, 0, 0] = 1e-42  # subnormal
    with untouched(conv_net):
        with ablate.ablated(conv_net, index.everything()):
            assert not weight.any()
        with attenuated(conv_net, index.everything(), 0.1):
            pass


def test_it_comes_back_when_the_block_raises(
    index: ablate.ComponentIndex, conv_net: nn.Module, untouched: Untouched
) -> None:
    with (
        untouched(conv_net),
        pytest.raises(ZeroDivisionError, match="on purpose"),
        ablate.ablated(conv_net, index.everything()),
    ):
        raise ZeroDivisionError("on purpose")


def test_nested_blocks_add_up_and_come_back(
    index: ablate.ComponentIndex, conv_net: nn.Module, untouched: Untouched
) -> None:
    weight = conv_net.get_parameter("conv1.weight")
    original = weight.detach().clone()
    with untouched(conv_net), ExitStack() as blocks:
        for ids in ([0, 1], [1, 2], [0, 1, 2]):  # the same slices again and again
            blocks.enter_context(ablate.ablated(conv_net, index.select(ids)))
        assert not weight[:3].any()
        assert torch.equal(weight[3], original[3])


def test_parameters_that_are_views_of_one_memory_come_back(untouched: Untouched) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared = nn.Parameter(model[0].get_parameter("weight").detach().t())  # another view of the same numbers
    model[1].register_parameter("weight", shared)
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"]).expect(6)
    with untouched(model), ablate.ablated(model, index.select([0, 1, 3, 4])):
        assert not model[0].get_parameter("weight")[:2].any()


def test_a_change_that_fails_half_way_is_undone(untouched: Untouched) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    model[1].register_parameter("weight", nn.Parameter(torch.ones(1, 3).expand(4, 3)))  # cannot be written row by row
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    with untouched(model), pytest.raises(RuntimeError, match="single memory location"):
        attenuate(model, index.everything(), 0.0)
    with (
        untouched(model),
        pytest.raises(RuntimeError, match="single memory location"),
        ablate.ablated(model, index.everything()),
    ):
        pytest.fail("the block must not run")


def test_attenuation_multiplies(index: ablate.ComponentIndex, conv_net: nn.Module, untouched: Untouched) -> None:
    weight = conv_net.get_parameter("fc.weight")
    original = weight.detach().clone()
    with untouched(conv_net), attenuated(conv_net, index.where(module="fc"), 0.5):
        assert torch.equal(weight, original * 0.5)
    with untouched(conv_net), attenuated(conv_net, index.where(module="fc"), 1.0):
        assert torch.equal(weight, original)


def test_attenuation_for_good_returns_what_it_overwrote(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    before = _values(conv_net)
    saved = attenuate(conv_net, index.select([1, 3, 16]), 0.0)
    assert [(name, axis, positions.tolist()) for name, axis, positions, _ in saved] == [
        ("conv1.weight", 0, [1, 3]),
        ("head.weight", 0, [1]),
    ]
    assert torch.equal(saved[0][3], before["conv1.weight"][[1, 3]])
    assert not conv_net.get_parameter("conv1.weight")[[1, 3]].any()
    assert attenuate(conv_net, index.everything(), 1.0) == []


def test_an_empty_selection_changes_nothing(
    index: ablate.ComponentIndex, conv_net: nn.Module, untouched: Untouched
) -> None:
    before = _values(conv_net)
    with untouched(conv_net), ablate.ablated(conv_net, index.select([])):
        assert all(torch.equal(before[name], now) for name, now in conv_net.named_parameters())


def test_a_weight_is_ablated_wherever_it_is_used() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].register_parameter("weight", model[0].get_parameter("weight"))
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"]).expect(3)
    with ablate.ablated(model, index.everything()), torch.no_grad():
        assert not model(torch.ones(1, 3)).any()


def test_gradients_flow_through_an_ablated_model(
    index: ablate.ComponentIndex, conv_net: nn.Module, images: Tensor
) -> None:
    with ablate.ablated(conv_net, index.select([0])):
        (gradient,) = torch.autograd.grad(conv_net(images).sum(), conv_net.get_parameter("conv1.weight"))
    assert gradient[1:].any()


def test_a_selection_of_another_model_is_refused_before_anything_is_written(
    index: ablate.ComponentIndex, mlp: nn.Module, untouched: Untouched
) -> None:
    with (
        untouched(mlp),
        pytest.raises(ablate.ModelMismatchError, match=r"was not made for this Sequential:\n"),
        ablate.ablated(mlp, index.everything()),
    ):
        pytest.fail("the block must not run")


def test_half_precision_weights_come_back(
    index: ablate.ComponentIndex, conv_net: nn.Module, untouched: Untouched
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        conv_net.to(dtype)
        with untouched(conv_net), attenuated(conv_net, index.everything(), 0.3):
            assert conv_net.get_parameter("fc.weight").dtype == dtype


def test_weights_in_another_memory_format_come_back(
    index: ablate.ComponentIndex, conv_net: nn.Module, images: Tensor, labels: Tensor, untouched: Untouched
) -> None:
    keep = np.zeros((1, len(index)), dtype=bool)
    expected = ablate.Engine(conv_net, index).outputs(keep, images, labels)
    conv_net.to(memory_format=torch.channels_last)
    with untouched(conv_net):
        with ablate.ablated(conv_net, index.everything()):
            assert not conv_net.get_parameter("conv1.weight").any()
        outputs = ablate.Engine(conv_net, index).outputs(keep, images, labels)
    torch.testing.assert_close(outputs, expected)
