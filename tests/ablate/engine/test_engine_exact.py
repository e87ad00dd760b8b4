"""Law 1: the engine equals the slow reference (copy, zero, run) on every architecture and component kind.

The list holds the traps: functional weights (nn.MultiheadAttention never calls `out_proj`, Swin passes its weights to
F.linear), depthwise and grouped convolutions, batch norm after a bias, shared and doubly used modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.digits import ResidualCNN
from ablate.engine.gated_model import Speed

EXAMPLES = 5
AS_GIVEN = Speed(fold=False, channels_last=False)  # no batch norm folded, no layout changed: equal bit for bit


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=6)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=6)
    return model


def _vision_transformer() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=6
    )
    return model


def _swin() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=6
    )
    return model


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int, int]]] = {
    "digits-residual-cnn": (lambda: ResidualCNN(classes=6), "conv_filter", (1, 16, 16)),
    "torchvision-resnet18": (lambda: _torchvision("resnet18"), "conv_filter", (3, 32, 32)),
    "torchvision-mobilenet": (lambda: _torchvision("mobilenet_v3_small"), "conv_filter", (3, 32, 32)),
    "torchvision-vit": (_vision_transformer, "linear_neuron", (3, 16, 16)),
    "torchvision-swin": (_swin, "linear_neuron", (3, 16, 16)),
    "timm-resnet": (lambda: _timm("test_resnet"), "conv_filter", (3, 32, 32)),
    "timm-vit": (lambda: _timm("test_vit"), "linear_neuron", (3, 160, 160)),
    "timm-vit-patches": (lambda: _timm("test_vit"), "conv_filter", (3, 160, 160)),
    "timm-convnext-filters": (lambda: _timm("test_convnext"), "conv_filter", (3, 64, 64)),
    "timm-convnext-neurons": (lambda: _timm("test_convnext"), "linear_neuron", (3, 64, 64)),
}


@pytest.fixture(params=ARCHITECTURES)
def case(
    request: pytest.FixtureRequest, randomise: Callable[[nn.Module, int], nn.Module]
) -> tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor]:
    build, kind, shape = ARCHITECTURES[request.param]
    model = randomise(build(), 0).eval()
    index = ablate.ComponentIndex.from_model(model, [kind])
    generator = torch.Generator().manual_seed(1)
    return model, index, torch.randn(EXAMPLES, *shape, generator=generator), torch.tensor([0, 5, 3, 1, 4])


def _keeps(index: ablate.ComponentIndex) -> npt.NDArray[np.bool_]:
    plan = ablate.KeepPlan(len(index), rows=3, ablate_fraction=0.1, seed=5)
    return np.concatenate([plan.take(0, 3), np.zeros((1, len(index)), dtype=bool)])


def _assert_close(got: Tensor, expected: Tensor, relative: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    difference = float((got - expected).abs().max())
    assert difference <= relative * float(expected.abs().max()), difference


def test_equals_the_reference(case: tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor]) -> None:
    model, index, inputs, targets = case
    keep = _keeps(index)
    expected = ablate.reference_outputs(model, index, keep, inputs, targets)
    assert float(expected[:3].std(dim=0).min()) > 0, "the keep-vectors must matter on every example"
    for batch_size in (2, 128):
        engine = ablate.Engine(model, index, batch_size=batch_size)
        _assert_close(engine.outputs(keep, inputs, targets), expected, 1e-5)
    doubled = copy.deepcopy(model).double()
    exact = ablate.reference_outputs(doubled, index, keep, inputs.double(), targets)
    engine = ablate.Engine(model, index, precision="float64", batch_size=2)
    _assert_close(engine.outputs(keep, inputs, targets), exact, 1e-10)


def test_with_everything_kept_is_the_plain_model(
    case: tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor],
) -> None:
    model, index, inputs, targets = case
    with torch.no_grad():
        plain = ablate.Margin()(model(inputs), targets)
    keep = np.ones((1, len(index)), dtype=bool)
    engine = ablate.Engine(model, index, speed=AS_GIVEN)
    assert torch.equal(engine.outputs(keep, inputs, targets)[0], plain)
    engine.outputs(~keep, inputs, targets)
    assert torch.equal(engine.outputs(keep, inputs, targets)[0], plain), "an earlier keep-vector must leave no trace"


def test_a_model_in_training_mode_runs_in_eval_mode(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    model = nn.Sequential(conv_net, nn.Dropout())
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"])
    keep = ablate.KeepPlan(len(index), 4, 0.2).take(0, 4)
    expected = ablate.Engine(model.eval(), index, speed=AS_GIVEN).outputs(keep, images, labels)
    assert torch.equal(ablate.Engine(model.train(), index, speed=AS_GIVEN).outputs(keep, images, labels), expected)
    assert torch.equal(ablate.reference_outputs(model, index, keep, images, labels), expected)


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
def test_an_ablated_weight_that_is_not_finite_becomes_zero(
    poison: float, conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    keep = np.ones((1, len(index)), dtype=bool)
    keep[0, [1, 6]] = False
    expected = ablate.Engine(conv_net, index, speed=AS_GIVEN).outputs(keep, images, labels)
    with torch.no_grad():
        conv_net.get_parameter("conv1.weight")[1] = poison
        conv_net.get_parameter("conv2.weight")[2, 0, 0, 0] = poison
    assert torch.equal(ablate.Engine(conv_net, index, speed=AS_GIVEN).outputs(keep, images, labels), expected)
    assert torch.equal(ablate.reference_outputs(conv_net, index, keep, images, labels), expected)


def test_an_index_given_in_parts_is_exact(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["linear_neuron", "conv_filter"], exclude=["conv1", "head"])
    assert [port.module for port in index.ports] == ["conv2", "fc"]
    keep = ablate.KeepPlan(len(index), 6, 0.3).take(0, 6)
    expected = ablate.reference_outputs(conv_net, index, keep, images, labels)
    _assert_close(ablate.Engine(conv_net, index).outputs(keep, images, labels), expected, 1e-6)


def test_integer_inputs_stay_integers(randomise: Callable[[nn.Module, int], nn.Module]) -> None:
    model = randomise(nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)), 3)
    index = ablate.ComponentIndex.from_model(model)
    tokens = torch.arange(12).reshape(4, 3) % 11
    keep = ablate.KeepPlan(len(index), 4, 0.4).take(0, 4)
    targets = torch.tensor([0, 1, 2, 0])
    expected = ablate.reference_outputs(model.eval(), index, keep, tokens, targets)
    _assert_close(ablate.Engine(model, index).outputs(keep, tokens, targets), expected, 1e-6)
