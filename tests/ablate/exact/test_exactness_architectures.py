"""Law 1 on the architectures people use: literal zeroing, weight gating, activation gating and gradients agree.

Weights, biases and statistics are random. The quick list holds small members of each family, the slow one the models
themselves, on small images: with every layer they have, and a quarter of the channels, for a layer is gated alike at
any width. Resnet18 and one block of a ViT-B have all their channels, so rounding is seen at the widths people use.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.engine.gated_model import Speed

SomeKeep = Callable[..., npt.NDArray[np.bool_]]
AS_GIVEN = Speed(fold=False, channels_last=False)
TRANSFORMER = ("qkv_neuron", "attention_head", "ffn_hidden", "residual_branch", "conv_filter", "linear_neuron")
CONVOLUTIONS = ("conv_filter", "linear_neuron")
BRANCHES = ("residual_branch", "conv_filter", "linear_neuron")
CLASSES, EXAMPLES = 5, 3

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return model


def _torchvision_class(name: str, *arguments: Any, **options: Any) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(*arguments, num_classes=CLASSES, **options)
    return model


def _resnet50() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    model: nn.Module = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=CLASSES, width_per_group=16)
    return model


def _vgg16() -> nn.Module:
    """Its first linear layer reads one place of the image instead of 49."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    thin = [width if isinstance(width, str) else width // 4 for width in cfgs["D"]]
    model = VGG(make_layers(thin, batch_norm=True), num_classes=CLASSES)
    model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(1), nn.Linear(128, 1024)
    model.classifier[3], model.classifier[6] = nn.Linear(1024, 1024), nn.Linear(1024, CLASSES)
    found: nn.Module = model
    return found


def _convnext_tiny() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = (24, 48, 96, 192, None)
    stages = [CNBlockConfig(widths[i], widths[i + 1], layers) for i, layers in enumerate((3, 3, 9, 3))]
    model: nn.Module = ConvNeXt(stages, num_classes=CLASSES)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return model


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    model: nn.Module = MlpMixer(num_classes=CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return model


def _unfused(name: str, **options: Any) -> nn.Module:
    model = _timm(name, **options)
    found = [module for module in model.modules() if hasattr(module, "fused_attn")]
    assert found
    for module in found:
        setattr(module, "fused_attn", False)  # noqa: B010 - a module's attributes are typed as tensors
    return model


class ZeroShot(nn.Module):
    """Logits are scaled cosines of an image's embedding and one of each class."""

    text: Tensor

    def __init__(self, visual: nn.Module, width: int) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("text", torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.nn.functional.normalize(self.visual(x), dim=-1)
        return 10 * features @ torch.nn.functional.normalize(self.text, dim=-1).T


def _clip_tower(embedding: int, **config: Any) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    tower: nn.Module = _build_vision_tower(embedding, CLIPVisionCfg(**config))
    return tower


class Logits(nn.Module):
    """A language model of transformers as a plain module: tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


VOCABULARY, TOKENS = 50, 9


def _gpt2() -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=VOCABULARY, n_positions=16)
    make: Any = AutoModelForCausalLM
    return Logits(make.from_config(config))


def _llama() -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    make: Any = AutoModelForCausalLM
    return Logits(make.from_config(config))


@dataclass(frozen=True)
class Architecture:
    """How to make a model, which components to look at, and what it takes."""

    build: Callable[[], nn.Module]
    kinds: tuple[str, ...]
    size: int = 32
    gradients: bool = True  # compare with autograd, one example at a time
    exclude: tuple[str, ...] = ()
    step: float = 1e-6  # of finite differences; larger for a model that computes in float32 inside


SWIN = {"window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "img_size": 32, "patch_size": 2}
QUICK: dict[str, Architecture] = {
    "tv-vit": Architecture(lambda: _torchvision_class("VisionTransformer", 32, 16, 2, 4, 32, 64), TRANSFORMER),
    "tv-swin": Architecture(
        lambda: _torchvision_class("SwinTransformer", [2, 2], 16, [2, 2], [2, 4], [4, 4]), TRANSFORMER
    ),
    "timm-resnet": Architecture(lambda: _timm("test_resnet"), BRANCHES),
    "timm-efficientnet": Architecture(lambda: _timm("test_efficientnet"), BRANCHES),
    "timm-convnext": Architecture(lambda: _timm("test_convnext"), TRANSFORMER),
    "timm-vit": Architecture(lambda: _timm("test_vit", img_size=48), TRANSFORMER),
    "timm-vit-unfused": Architecture(lambda: _unfused("test_vit", img_size=48), TRANSFORMER),
    "timm-swin": Architecture(lambda: _timm("swin_tiny_patch4_window7_224", **SWIN), TRANSFORMER),
    "timm-mixer": Architecture(_mixer, TRANSFORMER),
    "clip-resnet": Architecture(
        lambda: ZeroShot(_clip_tower(16, layers=[1, 1, 1, 1], width=8, image_size=32, head_width=32), 16), TRANSFORMER
    ),
    "clip-vit": Architecture(
        lambda: ZeroShot(_clip_tower(16, layers=2, width=32, head_width=8, patch_size=16, image_size=32), 16),
        TRANSFORMER,
    ),
    "gpt2": Architecture(_gpt2, TRANSFORMER, size=0, exclude=("model.lm_head",)),
    "gpt2-inputs": Architecture(_gpt2, ("linear_input",), size=0, exclude=("model.lm_head",)),
    "llama": Architecture(_llama, TRANSFORMER, size=0, step=1e-4),
}
SLOW: dict[str, Architecture] = {
    "tv-resnet18": Architecture(lambda: _torchvision("resnet18"), BRANCHES),
    "tv-resnet50": Architecture(_resnet50, CONVOLUTIONS),
    "tv-vgg16_bn": Architecture(_vgg16, CONVOLUTIONS),
    "tv-vit-b-widths": Architecture(
        lambda: _torchvision_class("VisionTransformer", 32, 16, 1, 12, 768, 3072), TRANSFORMER
    ),
    "tv-swin_t": Architecture(
        lambda: _torchvision_class("SwinTransformer", [4, 4], 24, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7]), TRANSFORMER
    ),
    "tv-convnext_tiny": Architecture(_convnext_tiny, TRANSFORMER),
    "tv-mobilenet": Architecture(lambda: _torchvision("mobilenet_v3_small"), ("conv_filter",)),
    "timm-vit_small": Architecture(
        lambda: _timm("vit_small_patch16_224", img_size=32, embed_dim=96, num_heads=6), TRANSFORMER
    ),
    "timm-swin_tiny": Architecture(
        lambda: _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24), TRANSFORMER, 64
    ),
    "timm-convnext_tiny": Architecture(lambda: _timm("convnext_tiny", dims=(24, 48, 96, 192)), TRANSFORMER),
    "timm-efficientnet_b0": Architecture(lambda: _timm("efficientnet_b0"), BRANCHES, gradients=False),
    "clip-RN50": Architecture(
        lambda: ZeroShot(_clip_tower(256, layers=[3, 4, 6, 3], width=16, image_size=64), 256), TRANSFORMER, 64
    ),
    "clip-ViT-B-32": Architecture(
        lambda: ZeroShot(_clip_tower(128, layers=12, width=192, patch_size=32, image_size=64), 128), TRANSFORMER, 64
    ),
    "clip-ViT-B-32-head": Architecture(
        lambda: nn.Sequential(
            _clip_tower(128, layers=2, width=192, patch_size=32, image_size=64), nn.Linear(128, CLASSES)
        ),
        ("linear_neuron", "qkv_neuron"),
        64,
    ),
}
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def _relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", ALL)
def test_all_ways_agree(
    name: str,
    randomise: Callable[[nn.Module, int], nn.Module],
    some_keep: SomeKeep,
    slow_gradients: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    case = QUICK.get(name) or SLOW[name]
    model = randomise(case.build(), 1).eval()
    index = ablate.ComponentIndex.from_model(model, list(case.kinds), exclude=case.exclude)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(EXAMPLES, 3, case.size, case.size, generator=generator)
    targets, output = torch.arange(EXAMPLES), "margin"
    if case.size == 0:
        inputs, targets = (torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS), generator=generator) for _ in range(2))
        output = "token_margin"
    data, keep = (inputs, targets), some_keep(index, EXAMPLES)
    gates = torch.tensor(keep, dtype=torch.float64)

    literal = ablate.reference_outputs(model, index, keep, *data, output)
    assert float(literal.std(dim=0).min()) > 1e-3, "the keep-vectors must matter on every example"
    engine = ablate.Engine(model, index, output, mode="weight", speed=AS_GIVEN)
    assert torch.equal(engine.outputs(keep, *data), literal)
    errors = {}
    engine = ablate.Engine(model, index, output, mode="weight")
    errors["folded"] = _relative(engine.outputs(keep, *data), literal)
    errors["activation"] = _relative(engine.example_outputs(gates, *data), literal.diagonal())

    model = copy.deepcopy(model).double()
    wide = inputs.double() if inputs.is_floating_point() else inputs
    exact = ablate.reference_outputs(model, index, keep, wide, targets, output)
    engine = ablate.Engine(model, index, output, precision="float64")
    errors["weight64"] = _relative(engine.outputs(keep, *data), exact)
    errors["activation64"] = _relative(engine.example_outputs(gates, *data), exact.diagonal())

    gates = 0.2 + torch.rand(gates.shape, generator=generator, dtype=torch.float64)
    outputs, gradients = engine.gate_gradients(gates, *data)
    errors["any gates64"] = _relative(engine.gated_outputs(gates, *data).diagonal(), outputs)
    along = torch.randn(gates.shape, generator=generator, dtype=torch.float64)
    step = case.step * along
    difference = engine.example_outputs(gates + step, *data) - engine.example_outputs(gates - step, *data)
    errors["differences"] = _relative((gradients * along).sum(dim=1), difference / (2 * case.step))
    if case.gradients:
        _, expected = slow_gradients(model, index, gates, inputs, targets, output)
        errors["gradients64"] = _relative(gradients, expected)
    logging.getLogger(__name__).info("%s: %s", name, ", ".join(f"{k} {error:.1e}" for k, error in errors.items()))
    limits = {"folded": 1e-5, "activation": 1e-5, "differences": max(1e-5, 10 * case.step)}
    assert {what: error for what, error in errors.items() if error > limits.get(what, 1e-10)} == {}


def test_models_are_gated_as_expected(randomise: Callable[[nn.Module, int], nn.Module]) -> None:
    """Else the list would not hold the cases it is for: weights used behind modules' backs, folded batch norm."""
    behind, folded = {}, {}
    for name in ("tv-vit", "tv-swin", "timm-resnet", "timm-vit", "clip-resnet"):
        model = randomise(QUICK[name].build(), 1).eval()
        inputs = torch.randn(2, 3, *[48 if name == "timm-vit" else 32] * 2, generator=torch.Generator().manual_seed(2))
        index = ablate.ComponentIndex.from_model(model, list(QUICK[name].kinds))
        table = ablate.Engine(model, index, example_inputs=inputs).explain()
        behind[name] = sorted(set(table["activation gating"].str.partition(":")[0]) - {"gated layer"})
        folded[name] = bool(table["notes"].str.contains("folded in").any())
        assert not table["activation gating"].str.startswith("refused").any()
    apart, used = ["attention taken apart"], ["gated where it is used"]
    assert behind == {"tv-vit": apart, "tv-swin": used, "timm-resnet": [], "timm-vit": [], "clip-resnet": used}
    assert [name for name, found in folded.items() if found] == ["timm-resnet", "clip-resnet"]
