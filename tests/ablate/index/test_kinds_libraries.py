"""Every component kind on the modules of every library: how many there are, counted by hand from the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ablate
from ablate.digits import ResidualCNN

KINDS = ["attention_head", "qkv_neuron", "ffn_in", "ffn_hidden", "residual_branch", "layer"]
Build = Callable[[], nn.Module]


def _torch_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2, enable_nested_tensor=False)


def _torch_decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 4, 12), 3)


def _torchvision(name: str, **arguments: Any) -> Build:
    def build() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
        return model

    return build


def _torchvision_vit() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=6
    )
    return model


def _torchvision_swin(version: int) -> Build:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as swin

        v2 = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        model: nn.Module = swin.SwinTransformer(
            [4, 4], 8, [1, 2], [2, 4], [4, 4], mlp_ratio=2.0, num_classes=5, **(v2 if version == 2 else {})
        )
        return model

    return build


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    model: nn.Module = ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=3)
    return model


def _timm(name: str, **arguments: Any) -> Build:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        return model

    return build


def _timm_vit(**arguments: Any) -> Build:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 3}
    return _timm("test_vit", **(settings | arguments))


def _timm_gated(packed: bool) -> Build:
    def build() -> nn.Module:
        from timm.layers.mlp import SwiGLU, SwiGLUPacked

        return _timm_vit(mlp_layer=SwiGLUPacked if packed else SwiGLU)()

    return build


def _timm_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    model: nn.Module = MlpMixer(num_classes=3, img_size=64, patch_size=32, num_blocks=2, embed_dim=16)
    return model


def _timm_convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    model: nn.Module = ConvNeXt(num_classes=3, depths=(2, 1, 1, 1), dims=(8, 16, 16, 16))
    return model


def _open_clip_vit() -> nn.Module:
    model = pytest.importorskip("open_clip.transformer")
    return model.VisionTransformer(  # type: ignore[no-any-return]
        image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    )


def _open_clip_resnet() -> nn.Module:
    model = pytest.importorskip("open_clip.modified_resnet")
    return model.ModifiedResNet((1, 2, 1, 1), output_dim=8, heads=4, image_size=32, width=8)  # type: ignore[no-any-return]


def _open_clip_own_attention() -> nn.Module:
    model = pytest.importorskip("open_clip.transformer")
    return model.CustomResidualAttentionBlock(16, 2, mlp_ratio=2.0, scale_attn=True)  # type: ignore[no-any-return]


def _gpt2(**arguments: Any) -> Build:
    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        config = library.GPT2Config(n_layer=2, n_embd=12, n_head=3, vocab_size=20, n_positions=16, **arguments)
        return library.GPT2LMHeadModel(config)  # type: ignore[no-any-return]

    return build


def _llama() -> nn.Module:
    library = pytest.importorskip("transformers")
    config = library.LlamaConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=30,
    )
    return library.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def _bert() -> nn.Module:
    library = pytest.importorskip("transformers")
    config = library.BertConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, vocab_size=30
    )
    return library.BertModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


# Net -> how to build it, and its numbers of attention heads, rows of query, key and value projections, rows of first
# layers, hidden units, residual branches and layers.
NETS: dict[str, tuple[Build, list[int]]] = {
    "torch encoder": (_torch_encoder, [2 * 2, 2 * 24, 2 * 12, 2 * 12, 2 * 2, 2 * 4]),
    "torch decoder": (_torch_decoder, [3 * 8, 3 * 48, 3 * 12, 3 * 12, 3 * 3, 3 * 6]),
    "torch attention": (lambda: nn.MultiheadAttention(8, 2), [2, 24, 0, 0, 0, 2]),
    "torch attention, other keys": (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4), [2, 24, 0, 0, 0, 4]),
    "digits": (ResidualCNN, [0, 0, 0, 0, 6, 14 + 1]),
    "torchvision resnet18": (_torchvision("resnet18"), [0, 0, 0, 0, 8, 21]),
    "torchvision resnet50": (_torchvision("resnet50"), [0, 0, 0, 0, 16, 54]),
    "torchvision vit": (_torchvision_vit, [2 * 2, 2 * 48, 2 * 24, 2 * 24, 2 * 2, 1 + 2 * 4 + 1]),
    # widths 8 and 16; layers: patches, 4 per block, merging, head
    "torchvision swin": (
        _torchvision_swin(1),
        [2 + 2 * 4, 3 * 8 + 2 * 48, 16 + 2 * 32, 16 + 2 * 32, 2 * 3, 1 + 4 * 3 + 1 + 1],
    ),
    # ... and the two layers of each block's table of positions
    "torchvision swin v2": (
        _torchvision_swin(2),
        [2 + 2 * 4, 3 * 8 + 2 * 48, 16 + 2 * 32, 16 + 2 * 32, 2 * 3, 1 + 6 * 3 + 1 + 1],
    ),
    "torchvision convnext": (_torchvision_convnext, [0, 0, 2 * 32 + 64, 2 * 32 + 64, 3, 1 + 3 * 3 + 1 + 1]),
    # stages of 1, 2, 2, 3, 3, 4, 1 blocks, the first of each without a skip; 4 + 2 convolutions make a full block
    "torchvision efficientnet_b0": (_torchvision("efficientnet_b0"), [0, 0, 0, 0, 9, 1 + 4 + 5 * 15 + 1 + 1]),
    "torchvision mobilenet_v2": (_torchvision("mobilenet_v2"), [0, 0, 0, 0, 10, 1 + 2 + 3 * 16 + 1 + 1]),
    "timm resnet18": (_timm("resnet18"), [0, 0, 0, 0, 8, 21]),
    "timm resnet50": (_timm("resnet50"), [0, 0, 0, 0, 16, 54]),
    "timm seresnet18": (_timm("legacy_seresnet18"), [0, 0, 0, 0, 8, 21 + 2 * 8]),
    "timm efficientnet_b0": (_timm("efficientnet_b0"), [0, 0, 0, 0, 9, 1 + 4 + 5 * 15 + 1 + 1]),
    "timm convnext": (
        _timm_convnext,
        [0, 0, 2 * 32 + 3 * 64, 2 * 32 + 3 * 64, 5, 1 + 5 * 3 + 3 + 1],
    ),
    "timm vit": (_timm_vit(), [2 * 4, 2 * 48, 2 * 48, 2 * 48, 2 * 2, 1 + 2 * 4 + 1]),
    "timm vit, gated": (
        _timm_gated(packed=False),
        [2 * 4, 2 * 48, 2 * 2 * 48, 2 * 48, 2 * 2, 1 + 2 * 5 + 1],
    ),
    "timm vit, gated in one layer": (
        _timm_gated(packed=True),
        [2 * 4, 2 * 48, 2 * 48, 2 * 24, 2 * 2, 1 + 2 * 4 + 1],
    ),
    # the pool: 16 rows of q, 32 of kv, heads of `proj`, and a network beside a residual connection
    "timm vit with a latent attention pool": (
        _timm_vit(global_pool="map", class_token=False),
        [3 * 4, 2 * 48 + 16 + 32, 3 * 48, 3 * 48, 2 * 2 + 1, 1 + 2 * 4 + 5 + 1],
    ),
    "timm mixer": (
        _timm_mixer,
        [0, 0, 2 * (8 + 64), 2 * (8 + 64), 2 * 2, 1 + 2 * 4 + 1],
    ),
    "open_clip vit": (_open_clip_vit, [2 * 2, 2 * 48, 2 * 32, 2 * 32, 2 * 2, 1 + 2 * 4]),
    # 3 convolutions in the stem, 3 per block and 1 in the shortcut of four of the five; the pool maps 256 to 8 channels
    "open_clip resnet": (_open_clip_resnet, [4, 3 * 256, 0, 0, 5, 3 + 3 * 5 + 4 + 4]),
    "open_clip's own attention": (_open_clip_own_attention, [2, 48, 32, 32, 2, 4]),
    "gpt2": (_gpt2(), [2 * 3, 2 * 36, 2 * 48, 2 * 48, 2 * 2, 2 * 4 + 1]),
    "gpt2 with cross-attention": (
        _gpt2(add_cross_attention=True),
        [2 * 6, 2 * 72, 2 * 48, 2 * 48, 2 * 3, 2 * 7 + 1],
    ),
    # 16 query rows, 8 key and 8 value rows for two groups of queries
    "llama": (_llama, [2 * 4, 2 * 32, 2 * 2 * 20, 2 * 20, 2 * 2, 2 * 7 + 1]),
    "bert": (_bert, [2 * 4, 2 * 48, 2 * 20, 2 * 20, 2 * 2, 2 * 6]),
}


def _count(model: nn.Module, kind: str) -> int:
    try:
        return len(ablate.ComponentIndex.from_model(model, [kind]))
    except ablate.SelectionError as error:
        assert f"no component of kind {kind}" in str(error)  # noqa: PT017
        return 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", NETS)
def test_counts(net: str) -> None:
    build, expected = NETS[net]
    with torch.device("meta"):
        model = build()
    assert dict(zip(KINDS, [_count(model, kind) for kind in KINDS], strict=True)) == dict(
        zip(KINDS, expected, strict=True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", NETS)
def test_hidden_units_are_the_columns_of_ffn_out_and_indices_fit_their_model(net: str) -> None:
    with torch.device("meta"):
        model = NETS[net][0]()
    for kind in (*KINDS, "linear_neuron", "linear_input"):
        if _count(model, kind):
            index = ablate.ComponentIndex.from_model(model, [kind])
            index.check(model)
            assert len(set(index.columns["name"])) == len(index)
    if _count(model, "ffn_hidden"):
        hidden = ablate.ComponentIndex.from_model(model, ["ffn_hidden"]).table()
        out = ablate.ComponentIndex.from_model(model, ["ffn_out"]).table()
        places = ["parameter", "port", "axis", "start", "stop"]
        assert hidden[places].equals(out[places])
        assert set(out["kind"]) == {"ffn_out"}
