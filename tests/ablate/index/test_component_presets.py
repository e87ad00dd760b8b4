"""Published enumerations: the counts of the papers, and what each leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ablate

Index = ablate.ComponentIndex


class _BasicBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class MiniResNet(nn.Module):
    """The CIFAR network of the COAR experiments: each block is an attribute of its own, too."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = [_BasicBlock(width) for _ in range(4)]
        for i, block in enumerate(blocks):
            setattr(self, f"block{i}", block)
        self.layer = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer(torch.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3)))
        return logits


def _model(library: str, name: str) -> nn.Module:
    with torch.device("meta"):
        if library == "torchvision":
            import torchvision

            model: nn.Module = torchvision.models.get_model(name, weights=None)
        else:
            import timm

            model = timm.create_model(name, pretrained=False)
    return model


def test_the_names() -> None:
    assert ablate.preset_names() == ("coar-resnet", "coar-vit", "coar-gpt2", "heads", "ffn")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_coar_resnet_has_22720_filters_and_leaves_3840_out(library: str) -> None:
    model = _model(library, "resnet50")
    index = Index.from_preset(model, "coar-resnet").expect(22_720)
    assert index.hash == Index.from_model(model, ["conv_filter"], exclude=["*.downsample.0"]).hash
    left_out = index.left_out()
    shortcuts = left_out[left_out["reason"] == "a shortcut convolution"]
    assert shortcuts["components"].tolist() == [256, 512, 1024, 2048]
    assert left_out["components"].sum() == 3_840
    assert Index.from_preset(model, "coar-resnet", shortcuts=True).expect(26_560).left_out()["components"].sum() == 0


def test_coar_resnet_has_2304_filters_of_the_cifar_network() -> None:
    model = MiniResNet()
    index = Index.from_preset(model, "coar-resnet").expect(2_304)
    assert len(index.ports) == 9, "no block is counted twice"
    assert Index.from_model(model, ["residual_branch"]).columns["name"].tolist() == [
        f"block{i}.bn2:residual_branch" for i in range(4)
    ]


def test_coar_resnet_of_a_network_without_residual_blocks_is_its_filters(conv_net: nn.Module) -> None:
    assert Index.from_preset(conv_net, "coar-resnet") == Index.from_model(conv_net, ["conv_filter"])


@pytest.mark.parametrize(("library", "name"), [("torchvision", "vit_b_16"), ("timm", "vit_base_patch16_224")])
def test_coar_vit_has_82944_neurons(library: str, name: str) -> None:
    index = Index.from_preset(_model(library, name), "coar-vit").expect(82_944)
    left_out = index.left_out()
    head = left_out[left_out["components"] > 0]
    assert head["module"].str.startswith("head").all()
    assert head["components"].tolist() == [1000]
    assert head["reason"].tolist() == ["the classification head"]


def test_coar_vit_leaves_out_every_layer_behind_the_last_block() -> None:
    import torchvision

    model = torchvision.models.VisionTransformer(
        16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=6, representation_size=10
    )
    index = Index.from_preset(model, "coar-vit").expect(2 * (48 + 16 + 24 + 16))
    left_out = index.left_out().set_index("module")
    assert left_out.loc["heads.pre_logits", "components"] == 10
    assert left_out.loc["heads.head", "components"] == 6


@pytest.mark.filterwarnings("ignore")
def test_coar_gpt2_has_64512_input_rows() -> None:
    library: Any = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = library.GPT2LMHeadModel(library.GPT2Config())
    index = Index.from_preset(model, "coar-gpt2").expect(64_512)
    assert {(port.port, port.axis, port.width) for port in index.ports} == {("in", 0, 1)}
    assert [port.count for port in index.ports] == [768, 768, 768, 3072] * 12
    assert index[0].name == "transformer.h.0.attn.c_attn:linear_input[0]"
    assert index[0].n_parameters == 3 * 768
    left_out = index.left_out().set_index("module")
    assert left_out.loc["lm_head", "reason"] == "a linear layer that is no Conv1D"
    Index.from_model(model).expect(12 * (2304 + 768 + 3072 + 768))  # by default rows: the other axis


def test_heads_and_ffn() -> None:
    model = _model("torchvision", "vit_b_16")
    assert Index.from_preset(model, "heads") == Index.from_model(model, ["attention_head"]).expect(144)
    assert Index.from_preset(model, "ffn") == Index.from_model(model, ["ffn_hidden"]).expect(12 * 3072)
    part = Index.from_preset(model, "heads", include=["*_layer_1[01].*"], exclude=["*_11.*"]).expect(12)
    assert part.left_out()["components"].sum() == 132


def test_a_misspelt_preset_is_named_with_the_nearest(conv_net: nn.Module) -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        Index.from_preset(conv_net, "coar-resnets")
    assert str(caught.value) == "No preset 'coar-resnets'. Did you mean 'coar-resnet' or 'coar-vit'?"


def test_a_preset_for_another_architecture(conv_net: nn.Module) -> None:
    with pytest.raises(ablate.SelectionError) as caught:
        Index.from_preset(conv_net, "coar-vit")
    assert str(caught.value) == (
        "Preset 'coar-vit' is for vision transformers, and no attention was found in this ConvNet. Make one known with "
        "ablate.register_attention, or give kinds to ComponentIndex.from_model(model, kinds=[...])."
    )
    with pytest.raises(ablate.SelectionError, match="no component of kind linear_input"):
        Index.from_preset(conv_net, "coar-gpt2")
    with pytest.raises(ablate.SelectionError, match="no component of kind attention_head"):
        Index.from_preset(conv_net, "heads")


def test_options_that_make_no_sense(conv_net: nn.Module) -> None:
    with pytest.raises(ablate.SelectionError) as caught:
        Index.from_preset(conv_net, "ffn", shortcuts=True)
    assert str(caught.value) == "shortcuts=True belongs to preset 'coar-resnet', not to 'ffn'. Leave it out."
    with pytest.raises(ablate.SelectionError, match=r"exclude is the string 'conv1', expected a list"):
        Index.from_preset(conv_net, "coar-resnet", exclude="conv1")
    with pytest.raises(ablate.UnknownNameError, match="No module 'conv3'"):
        Index.from_preset(conv_net, "coar-resnet", exclude=["conv3"])
