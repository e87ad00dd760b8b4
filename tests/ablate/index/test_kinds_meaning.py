"""What the slices of a kind do in a forward pass: a head, a hidden unit and a branch are what they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.digits import ResidualCNN

Randomise = Callable[[nn.Module, int], nn.Module]


def _silence(model: nn.Module) -> int:
    """Clears weight and bias of every residual branch's last module; returns how many there are."""
    index = ablate.ComponentIndex.from_model(model, ["residual_branch"])
    with torch.no_grad():
        for port in index.ports:
            assert port.with_bias
            assert (port.count, port.port) == (1, "out")
            end = model.get_submodule(port.module)
            assert dict(model.named_parameters())[port.parameter] is end.weight
            for tensor in end.parameters(recurse=False):
                tensor.zero_()
    return len(index)


def _blocks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """Returns blocks that add to their input: how to build one, the shape of an input, the number of branches."""
    from timm.layers.squeeze_excite import SqueezeExcite
    from timm.models import _efficientnet_blocks as efficient
    from timm.models import convnext, resnetv2, swin_transformer, swin_transformer_v2, vision_transformer
    from torchvision.models import convnext as tv_convnext
    from torchvision.models import mobilenetv2 as tv_mobilenet
    from torchvision.models import swin_transformer as tv_swin
    from torchvision.models import vision_transformer as tv_vit

    norm = torch.nn.LayerNorm
    return {
        "torch, norm first": (lambda: nn.TransformerEncoderLayer(8, 2, 12, norm_first=True), (5, 2, 8), 2),
        "torchvision vit": (lambda: tv_vit.EncoderBlock(2, 8, 12, 0.0, 0.0), (2, 5, 8), 2),
        "torchvision swin": (lambda: tv_swin.SwinTransformerBlock(8, 2, [2, 2], [0, 0]), (2, 4, 4, 8), 2),
        "torchvision swin v2": (lambda: tv_swin.SwinTransformerBlockV2(8, 2, [2, 2], [0, 0]), (2, 4, 4, 8), 2),
        "torchvision convnext": (lambda: tv_convnext.CNBlock(8, 1.0, 0.0), (2, 8, 6, 6), 1),
        "torchvision mobilenet": (lambda: tv_mobilenet.InvertedResidual(8, 8, 1, 4), (2, 8, 6, 6), 1),
        "timm vit": (lambda: vision_transformer.Block(8, 2, init_values=0.1), (2, 5, 8), 2),
        "timm parallel vit": (lambda: vision_transformer.ParallelThingsBlock(8, 2), (2, 5, 8), 4),
        "timm swin": (
            lambda: swin_transformer.SwinTransformerBlock(8, (4, 4), num_heads=2, window_size=2),
            (2, 4, 4, 8),
            2,
        ),
        "timm swin v2": (
            lambda: swin_transformer_v2.SwinTransformerV2Block(8, (4, 4), num_heads=2, window_size=2),
            (2, 4, 4, 8),
            2,
        ),
        "timm convnext": (lambda: convnext.ConvNeXtBlock(8), (2, 8, 6, 6), 1),
        "timm inverted residual": (
            lambda: efficient.InvertedResidual(8, 8, se_layer=SqueezeExcite),
            (2, 8, 6, 6),
            1,
        ),
        "timm depthwise separable": (lambda: efficient.DepthwiseSeparableConv(8, 8), (2, 8, 6, 6), 1),
        "timm universal": (lambda: efficient.UniversalInvertedResidual(8, 8), (2, 8, 6, 6), 1),
        "timm norm first": (lambda: resnetv2.PreActBottleneck(8, 8, norm_layer=_group_norm), (2, 8, 6, 6), 1),
        "norm": (lambda: nn.Sequential(vision_transformer.Block(8, 2, norm_layer=norm)), (2, 5, 8), 2),
    }


def _group_norm(channels: int, **_: Any) -> nn.Module:
    return nn.GroupNorm(2, channels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _blocks())
def test_a_block_without_its_branches_is_the_identity(name: str, randomise: Randomise) -> None:
    build, shape, branches = _blocks()[name]
    block = randomise(build(), 1).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert (block(x) - x).abs().max().item() > 1e-3
    assert _silence(block) == branches
    assert torch.equal(block(x), x)


def _resnet_blocks() -> list[nn.Module]:
    import timm
    import torchvision

    models = [torchvision.models.resnet18(weights=None), timm.create_model("resnet50", pretrained=False)]
    return [models[0].layer2[0], models[0].layer2[1], models[1].layer1[0], models[1].layer1[1], ResidualCNN().blocks[2]]


@pytest.mark.parametrize("number", range(5))
def test_a_resnet_block_without_its_branch_is_its_shortcut(number: int, randomise: Randomise) -> None:
    block = randomise(_resnet_blocks()[number], 1).eval()
    channels = block.get_parameter("conv1.weight").shape[1]
    x = torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(2))
    shortcut: Any = getattr(block, "downsample", None) or getattr(block, "shortcut", None) or nn.Identity()
    expected = torch.relu(shortcut(x))
    assert (block(x) - expected).abs().max().item() > 1e-3
    assert _silence(block) == 1
    assert torch.equal(block(x), expected)


def test_a_head_is_what_attention_adds_through_it(randomise: Randomise) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    randomise(attention, 1).eval()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).reshape(2, 5, 3, 3, 4).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    heads = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    index = ablate.ComponentIndex.from_model(attention, ["attention_head"]).expect(3)
    for head in range(3):
        without = heads.clone()
        without[:, :, head] = 0
        expected = without.flatten(2) @ attention.out_proj.weight.T + attention.out_proj.bias
        with ablate.ablated(attention, index.select([head])), torch.no_grad():
            torch.testing.assert_close(attention(x, x, x)[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_gpt2_is_what_attention_adds_through_it(randomise: Randomise) -> None:
    library = pytest.importorskip("transformers")
    config = library.GPT2Config(n_layer=1, n_embd=12, n_head=3, vocab_size=20, n_positions=16)
    block: Any = library.GPT2LMHeadModel(config).transformer.h[0]
    randomise(block, 1).eval()
    seen: list[Tensor] = []
    block.attn.c_proj.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output]))
    index = ablate.ComponentIndex.from_model(block, ["attention_head"]).expect(3)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    with ablate.ablated(block, index.select([1])), torch.no_grad():
        block(x)
    heads, output = seen
    heads.reshape(2, 5, 3, 4)[:, :, 1] = 0
    torch.testing.assert_close(output, block.attn.c_proj(heads).detach())


@pytest.mark.parametrize("gated", [False, True])
def test_a_hidden_unit_is_what_the_second_layer_reads(gated: bool, randomise: Randomise) -> None:
    from timm.layers.mlp import Mlp, SwiGLU

    network: Any = randomise(SwiGLU(4, 6) if gated else Mlp(4, 6), 1).eval()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    index = ablate.ComponentIndex.from_model(network, ["ffn_hidden"]).expect(6)
    hidden = network.act(network.fc1_g(x)) * network.fc1_x(x) if gated else network.act(network.fc1(x))
    hidden[..., 4] = 0
    with ablate.ablated(network, index.select([4])), torch.no_grad():
        torch.testing.assert_close(network(x), network.fc2(hidden))
