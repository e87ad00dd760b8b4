"""Which components an index lists: kinds, patterns, defaults, shared weights, and what it says about the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ablate


def _modules(model: nn.Module, **arguments: Any) -> list[str]:
    return [port.module for port in ablate.ComponentIndex.from_model(model, **arguments).ports]


def test_the_registered_kinds() -> None:
    assert ablate.component_kinds() == (
        "conv_filter",
        "linear_neuron",
        "linear_input",
        "attention_head",
        "qkv_neuron",
        "ffn_in",
        "ffn_hidden",
        "ffn_out",
        "residual_branch",
        "layer",
    )


def test_the_default_of_a_convolutional_net_is_its_filters(conv_net: nn.Module) -> None:
    assert _modules(conv_net) == ["conv1", "conv2"]


def test_the_default_of_an_mlp_is_its_neurons_without_the_classes(mlp: nn.Module) -> None:
    assert _modules(mlp) == ["0", "2"]


def test_the_default_of_a_vision_transformer_is_its_neurons_without_the_classes() -> None:
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=6
    )
    block = "encoder.layers.encoder_layer_0"
    attention = f"{block}.self_attention"
    assert _modules(model) == [attention, f"{attention}.out_proj", f"{block}.mlp.0", f"{block}.mlp.3"]
    left_out = ablate.ComponentIndex.from_model(model).left_out().set_index("module")
    assert left_out.loc["heads.head", "reason"] == (
        "makes what the model returns, the classes: seen by following values"
    )
    assert left_out.loc["heads.head", "components"] == 6
    assert left_out.loc["conv_proj", "reason"] == "a Conv2d is none of linear_neuron, qkv_neuron"
    left_out = ablate.ComponentIndex.from_model(model, ["linear_neuron"]).left_out().set_index("module")
    assert left_out.loc[attention, "reason"] == "a MultiheadAttention is none of linear_neuron"
    assert left_out.loc[attention, "parameters"] == 48 * 16 + 48
    assert left_out.loc["encoder", "reason"] == "an Encoder is none of linear_neuron"


def test_the_default_names_each_row_once_where_projections_are_linear_layers() -> None:
    import timm

    model = timm.create_model("test_vit", pretrained=False)
    index = ablate.ComponentIndex.from_model(model)
    assert {port.kind for port in index.ports} == {"linear_neuron"}
    assert "blocks.0.attn.qkv" in index.columns["module"]
    assert "head" not in index.columns["module"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Conv2d(1, 2, 1), nn.Linear(2, 2)], ["0"]),  # the only linear layer holds the classes
        ([nn.Conv2d(1, 2, 1), nn.Linear(2, 2), nn.Linear(2, 2)], ["1"]),
        ([nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.Linear(2, 2)], ["0", "1"]),
        ([nn.Linear(2, 2), nn.Linear(2, 2)], ["0"]),
    ],
)
def test_the_default_counts_convolutions_against_hidden_linear_layers(
    layers: list[nn.Module], expected: list[str]
) -> None:
    assert _modules(nn.Sequential(*layers)) == expected


def test_kinds_given_include_the_classes(conv_net: nn.Module) -> None:
    assert _modules(conv_net, kinds=["linear_neuron"]) == ["fc", "head"]
    assert _modules(conv_net, kinds=["linear_neuron", "conv_filter"]) == ["conv1", "conv2", "fc", "head"]


def test_include_and_exclude_are_patterns_of_module_names(conv_net: nn.Module) -> None:
    both = ["conv_filter", "linear_neuron"]
    assert _modules(conv_net, kinds=both, include=["conv*", "head"]) == ["conv1", "conv2", "head"]
    assert _modules(conv_net, kinds=both, exclude=["conv?"]) == ["fc", "head"]
    assert _modules(conv_net, kinds=both, include=["conv*"], exclude=["*1"]) == ["conv2"]


def test_layers_count_the_indexed_modules_only(conv_net: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"], exclude=["conv1"])
    assert [(port.layer, port.module) for port in index.ports] == [(0, "conv2"), (1, "fc"), (2, "head")]


def test_left_out_names_every_module_with_parameters_that_is_not_listed(conv_net: nn.Module) -> None:
    left_out = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"], exclude=["conv2"]).left_out()
    assert left_out.to_dict("records") == [
        {"module": "bn1", "parameters": 8, "components": 0, "reason": "a BatchNorm2d is none of conv_filter"},
        {"module": "conv2", "parameters": 108, "components": 6, "reason": "excluded by name"},
        {"module": "bn2", "parameters": 12, "components": 0, "reason": "a BatchNorm2d is none of conv_filter"},
        {"module": "fc", "parameters": 35, "components": 0, "reason": "a Linear is none of conv_filter"},
        {"module": "head", "parameters": 18, "components": 0, "reason": "a Linear is none of conv_filter"},
    ]


def test_left_out_is_an_empty_table_where_nothing_is(mlp: nn.Module) -> None:
    left_out = ablate.ComponentIndex.from_model(mlp, ["linear_neuron"]).left_out()
    assert list(left_out.columns) == ["module", "parameters", "components", "reason"]
    assert left_out.empty


def test_a_weight_that_two_modules_share_is_listed_under_the_first(mlp: nn.Module) -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[2].register_parameter("weight", tied[0].get_parameter("weight"))
    index = ablate.ComponentIndex.from_model(tied, ["linear_neuron"])
    assert [port.module for port in index.ports] == ["0", "3"]
    assert index.left_out().to_dict("records") == [
        {"module": "2", "parameters": 0, "components": 4, "reason": "shares its weight with '0', which is listed"}
    ]


def test_a_weight_shared_with_a_module_of_another_kind_is_listed_by_its_canonical_name() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(4, 7, bias=False))
    model[2].register_parameter("weight", model[0].get_parameter("weight"))
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"]).expect(7)
    assert (index[0].module, index[0].parameter) == ("2", "0.weight")


def test_a_module_used_twice_is_listed_once(mlp: nn.Module) -> None:
    layer = nn.Linear(4, 4)
    index = ablate.ComponentIndex.from_model(nn.Sequential(layer, nn.ReLU(), layer), ["linear_neuron"])
    assert [port.module for port in index.ports] == ["0"]


def test_a_misspelt_module_is_named_with_the_nearest(conv_net: nn.Module) -> None:
    for argument in ("include", "exclude"):
        misspelt: dict[str, Any] = {argument: ["conv3"]}
        with pytest.raises(ablate.UnknownNameError) as caught:
            ablate.ComponentIndex.from_model(conv_net, **misspelt)
        assert str(caught.value) == (
            "No module 'conv3'. Did you mean 'conv2' or 'conv1'? 6 names were tried; patterns like 'layer4.*' are "
            "allowed."
        )
        assert caught.value.nearest == ["conv2", "conv1"]


def test_a_misspelt_kind_is_named_with_the_nearest(conv_net: nn.Module) -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.ComponentIndex.from_model(conv_net, ["linear_neuron", "conv_filters"])
    assert str(caught.value) == "No component kind 'conv_filters'. Did you mean 'conv_filter'?"
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.ComponentIndex.from_model(conv_net, ["head"])
    assert str(caught.value) == (
        "No component kind 'head'. Known: conv_filter, linear_neuron, linear_input, attention_head, qkv_neuron, "
        "ffn_in, ffn_hidden, ffn_out, residual_branch, layer."
    )


@pytest.mark.parametrize("argument", ["kinds", "include", "exclude"])
def test_a_string_where_a_list_is_meant(argument: str, conv_net: nn.Module) -> None:
    text: dict[str, Any] = {argument: "conv1"}
    with pytest.raises(ablate.SelectionError) as caught:
        ablate.ComponentIndex.from_model(conv_net, **text)
    assert str(caught.value) == f"{argument} is the string 'conv1', expected a list: {argument}=['conv1']."


def test_no_component_left(conv_net: nn.Module) -> None:
    with pytest.raises(ablate.SelectionError) as caught:
        ablate.ComponentIndex.from_model(conv_net, ["conv_filter"], include=["fc"])
    assert str(caught.value) == (
        "ConvNet has no component of kind conv_filter in the modules asked for. Kinds: conv_filter, linear_neuron, "
        "linear_input, attention_head, qkv_neuron, ffn_in, ffn_hidden, ffn_out, residual_branch, layer; in this model: "
        "conv_filter, linear_neuron, linear_input, layer. Give other kinds, or widen include/exclude."
    )
    with pytest.raises(ablate.SelectionError, match=r"are made known with ablate\.register_attention, "):
        ablate.ComponentIndex.from_model(conv_net, ["attention_head"])


def test_a_computed_weight_is_refused_until_it_is_excluded() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ablate.ModelMismatchError) as caught:
        ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    assert str(caught.value) == (
        "Module '1': its weight is computed (a parametrization?) and no parameter of the model, so it cannot be gated. "
        "Remove the parametrization, or leave the module out with exclude=[...]."
    )
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], exclude=["1"]).expect(3)
    keep = torch.zeros(1, 3, dtype=torch.bool)
    ablate.Engine(model, index).outputs(keep, torch.ones(2, 3), [0, 1])
