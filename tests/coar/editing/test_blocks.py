"""Blocks: what lies between a layer and its value in networks of every form, and that running it alone agrees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from coar.editing.where.blocks import Block, branch_ends, capture, find_block, layer_keys, run_block, run_until
from coar.errors import EditError


class Res(nn.Module):
    """A residual block as users write it: no library's attribute names, its convolutions in a sequence."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.body(x)))


class Plain(nn.Module):
    """Layers as attributes, called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.act(self.conv(x)).mean((2, 3)))
        return found


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Res(6),
        Res(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
        nn.Dropout(),
        nn.GELU(),
        nn.Linear(4, 3),
    )


def _vgg() -> nn.Module:
    model: nn.Module = torchvision.models.vgg11_bn(num_classes=5)
    return model


def _normalised(model: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Identity(), model())


def _resnet() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=5)
    return model


def _vit() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", img_size=32, num_classes=4)
    return model


def _torch_vit() -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
    return model


CASES = [
    (_cnn, "0", ("0", "1", "2", "3"), (2, 8, 8, 3), (2, 6, 4, 4)),
    (_cnn, "5.last", ("5",), (2, 4, 4, 6), (2, 6, 4, 4)),
    (_cnn, "8", ("8", "9", "10"), (2, 6), (2, 4)),
    (_cnn, "11", ("11",), (2, 4), (2, 3)),
    (Plain, "conv", ("conv",), (2, 8, 8, 3), (2, 4, 6, 6)),
    (Plain, "fc", ("fc",), (2, 4), (2, 2)),
    (_vit, "blocks.1.mlp.fc2", ("blocks.1",), (2, 5, 192), (2, 5, 64)),
    (_vit, "blocks.1.attn.proj", ("blocks.1",), (2, 5, 64), (2, 5, 64)),
    (_vit, "head", ("head",), (2, 64), (2, 4)),
    (_torch_vit, "encoder.layers.encoder_layer_1.mlp.3", ("encoder.layers.encoder_layer_1",), (2, 17, 32), (2, 17, 16)),
]
PLACES = [  # too large to run here
    (_vgg, "features.25", ("features.25", "features.26", "features.27", "features.28")),  # the max-pool too
    (_vgg, "features.22", ("features.22", "features.23", "features.24")),
    (lambda: _normalised(_vgg), "1.features.22", ("1.features.22", "1.features.23", "1.features.24")),
    (_resnet, "layer4.1.conv2", ("layer4.1",)),
    (_resnet, "conv1", ("conv1",)),
    (_resnet, "fc", ("fc",)),
    (lambda: _normalised(_resnet), "1.conv1", ("1.conv1",)),
    (lambda: _normalised(_resnet), "1.layer4.0.downsample.0", ("1.layer4.0",)),
]


def _inputs(model: Callable[[], nn.Module]) -> Tensor:
    size = 8 if model in (_cnn, Plain) else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("model", "layer", "modules"), [case[:3] for case in CASES] + PLACES)
def test_block_of_a_layer(model: Callable[[], nn.Module], layer: str, modules: tuple[str, ...]) -> None:
    assert find_block(model(), layer) == Block(layer, modules)


@pytest.mark.parametrize(("make", "layer", "modules", "keys", "value"), CASES)
def test_running_it_alone_agrees(
    make: Callable[[], nn.Module], layer: str, modules: tuple[str, ...], keys: tuple[int, ...], value: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    model, inputs = make().eval(), _inputs(make)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = find_block(model, layer)
    (captured,) = capture(model, block, inputs)
    args, kwargs, output = captured
    kept = [a.clone() for a in args]
    first = run_block(model, block, args, kwargs)
    assert torch.equal(first, output)
    assert torch.equal(run_block(model, block, args, kwargs), output)  # inputs survive blocks that work in place
    assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))
    assert tuple(output.shape) == value
    assert tuple(layer_keys(model, layer, inputs).shape) == keys
    assert torch.allclose(run_until(model, block, inputs), output, atol=1e-6)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_flow_through_run_block_and_run_until() -> None:
    model = _cnn().eval().requires_grad_(False)
    inputs = _inputs(_cnn)
    weight = model.get_parameter("5.last.weight").requires_grad_(True)
    block = find_block(model, "5.last")
    ((args, kwargs, output),) = capture(model, block, inputs)
    assert not output.requires_grad
    assert not args[0].requires_grad
    (alone,) = torch.autograd.grad(run_block(model, block, args, kwargs).square().mean(), [weight])
    (until,) = torch.autograd.grad(run_until(model, block, inputs).square().mean(), [weight])
    assert float(alone.norm()) > 0
    assert torch.allclose(alone, until)


def test_run_until_does_not_run_what_follows() -> None:
    model = _cnn().eval()
    called: list[str] = []
    for name in ("0", "3", "4", "11"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    run_until(model, find_block(model, "0"), _inputs(_cnn))
    assert called == ["0", "3"]


def test_batches_are_those_asked_for() -> None:
    model, inputs = _cnn().eval(), torch.randn(5, 3, 8, 8)
    found = capture(model, find_block(model, "0"), inputs, batch_size=2)
    assert [len(output) for _, _, output in found] == [2, 2, 1]


def test_keys_are_what_the_layer_multiplies() -> None:
    model, inputs = _vit().eval(), _inputs(_vit)
    layer = model.get_submodule("blocks.1.mlp.fc2")
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda _, args, output: seen.append(output))
        model(inputs)
        handle.remove()
        keys = layer_keys(model, "blocks.1.mlp.fc2", inputs)
        weight, bias = (model.get_parameter(f"blocks.1.mlp.fc2.{name}") for name in ("weight", "bias"))
        assert torch.allclose(keys @ weight.T + bias, seen[0], atol=1e-5)
        image = layer_keys(_cnn().eval(), "0", inputs)
    assert torch.equal(image.permute(0, 3, 1, 2), inputs)


def test_last_layers_of_branches() -> None:
    assert branch_ends(_vgg()) == {}
    resnet = branch_ends(_resnet())
    assert resnet["layer4.1.conv2"] == "layer4.1"
    assert sorted(resnet) == sorted(f"layer{i}.{j}.conv2" for i in (1, 2, 3, 4) for j in (0, 1))
    assert set(branch_ends(timm.create_model("test_resnet"))) >= {"layer3.0.conv3", "layer4.0.conv2"}
    assert {end for end in branch_ends(_vit()) if end.startswith("blocks.1.")} == {
        "blocks.1.attn.proj",
        "blocks.1.mlp.fc2",
    }


def test_around_names_the_block() -> None:
    model = _vit()
    assert find_block(model, "blocks.1.mlp.fc2", "blocks.1.mlp").modules == ("blocks.1.mlp",)
    assert find_block(model, "blocks.1.mlp.fc2", "blocks.1.mlp.fc2").modules == ("blocks.1.mlp.fc2",)


def test_encoder_layers_of_torch_take_no_short_cut() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2)).eval().requires_grad_(False)
    inputs = torch.randn(2, 3, 8)
    assert tuple(layer_keys(model, "0.linear2", inputs).shape) == (2, 3, 16)
    block = find_block(model, "0.linear2")
    ((args, kwargs, output),) = capture(model, block, inputs)
    model.get_parameter("0.linear2.weight").requires_grad_(True)
    assert torch.equal(run_block(model, block, args, kwargs), output)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.fc(x))
        return found


class Skips(nn.Module):
    """Runs only some items of its sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.steps[2](self.steps[0](x))
        return found


def test_errors() -> None:
    plain = Plain().eval()
    with pytest.raises(EditError) as missing:
        find_block(plain, "cnv")
    assert str(missing.value) == "This Plain has no module 'cnv'. See model.named_modules()."
    with pytest.raises(EditError) as outside:
        find_block(plain, "conv", "fc")
    assert str(outside.value) == "around is 'fc', which does not contain the layer 'conv'."
    with pytest.raises(EditError) as unused:
        layer_keys(plain, "unused", _inputs(Plain))
    assert str(unused.value) == (
        "This Plain calls 'unused' 0 times in a forward, expected once: its weights are used without calling it as a "
        "module, or not at all. Select another layer."
    )
    twice = Twice().eval()
    with pytest.raises(EditError) as shared:
        capture(twice, find_block(twice, "fc"), torch.randn(2, 3))
    assert str(shared.value) == (
        "This Twice calls 'fc' 2 times in a forward, expected once: it is shared. Select another layer."
    )
    skips = Skips().eval()
    with pytest.raises(EditError) as other:
        capture(skips, find_block(skips, "steps.0"), torch.randn(2, 3))
    assert str(other.value) == (
        "Running 'steps.0' then 'steps.1' then 'steps.2' alone does not give what the model computes there: its "
        "forward does something else. Name a module that contains the layer 'steps.0' with around=."
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*plain.modules(), *twice.modules()))
