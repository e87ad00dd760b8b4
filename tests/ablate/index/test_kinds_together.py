"""Several kinds in one index, their names, and modules of a user's own that are made known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.index import residual, structure

Index = ablate.ComponentIndex
ALL = ablate.component_kinds()


@pytest.fixture
def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)


@pytest.fixture
def registries() -> Iterator[None]:
    tables: list[dict[type[nn.Module], object]] = [
        structure._registered_attentions,  # type: ignore[list-item]
        structure._registered_feed_forwards,  # type: ignore[list-item]
        residual._registered,  # type: ignore[list-item]
    ]
    before = [dict(table) for table in tables]
    yield
    for table, then in zip(tables, before, strict=True):
        table.clear()
        table.update(then)


def test_modules_come_in_order_and_kinds_in_the_order_given(layer: nn.Module) -> None:
    index = Index.from_model(layer, ["attention_head", "linear_neuron", "qkv_neuron", "ffn_hidden"])
    assert [(p.layer, p.module, p.kind, p.count, p.width) for p in index.ports] == [
        (0, "self_attn", "qkv_neuron", 24, 1),
        (1, "self_attn.out_proj", "attention_head", 2, 4),
        (1, "self_attn.out_proj", "linear_neuron", 8, 1),
        (2, "linear1", "linear_neuron", 6, 1),
        (3, "linear2", "linear_neuron", 8, 1),
        (3, "linear2", "ffn_hidden", 6, 1),
    ]
    assert repr(index) == f"<ComponentIndex: 54 components in 4 modules, {index.hash[:12]}>"
    assert index.modules()["module"].tolist() == [p.module for p in index.ports]
    assert len(index.where(layer=1)) == 10
    assert len(index.where(kind="attention_head")) == 2
    with pytest.raises(ablate.UnknownNameError, match="Layers are 0 to 3"):
        index.where(layer=4)
    with pytest.raises(ablate.UnknownNameError, match="lists all 4 indexed modules"):
        index.where(module="self_attn.out_projection")


def test_names_in_full(layer: nn.Module) -> None:
    index = Index.from_model(layer, ["layer", "attention_head", "ffn_in"], include=["self_attn*", "linear1"])
    assert index.columns["name"].tolist() == [
        "self_attn.in_proj_weight:layer",
        "self_attn.out_proj:layer",
        "self_attn.out_proj:attention_head[0]",
        "self_attn.out_proj:attention_head[1]",
        "linear1:layer",
    ]
    assert [component.name for component in index] == index.columns["name"].tolist()
    branches = Index.from_model(layer, ["residual_branch", "linear_neuron"], exclude=["linear1"])
    assert branches[0].name == "self_attn.out_proj:residual_branch"
    assert Index.from_model(nn.Linear(2, 3), ["linear_input"]).columns["name"].tolist() == [
        ":linear_input[0]",
        ":linear_input[1]",
    ]


@pytest.mark.parametrize("order", [ALL, ALL[::-1]])
def test_the_first_of_two_kinds_that_mean_the_same_slices_counts(order: tuple[str, ...], layer: nn.Module) -> None:
    index = Index.from_model(layer, order)
    places = [(p.parameter, p.axis, p.port) for p in index.ports]
    assert len(places) == len(set(places)) == 1 + 3 * 2
    assert len(set(index.columns["name"])) == len(index)
    left_out = index.left_out()
    first, second = ("linear_neuron", "layer") if order == ALL else ("layer", "linear_neuron")
    reasons = left_out[left_out["module"] == "linear1"]["reason"].tolist()
    assert f"as {second} the same slices as {first}, which is listed" in reasons
    assert Index.from_json(index.to_json()) == index
    index.check(layer)


def test_an_excluded_module_counts_each_slice_once(layer: nn.Module) -> None:
    index = Index.from_model(layer, ["linear_neuron", "layer", "linear_input"], exclude=["linear1"])
    assert index.left_out().set_index("module").loc["linear1", "components"] == 6 + 8


def test_a_shared_weight_is_listed_once_per_axis() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].register_parameter("weight", tied[0].get_parameter("weight"))
    index = Index.from_model(tied, ["linear_neuron", "linear_input"]).expect(8)
    assert index.left_out()["reason"].tolist() == ["shares its weight with '0', which is listed"] * 2


def test_an_index_of_heads_refuses_a_model_of_other_shapes(layer: nn.Module) -> None:
    index = Index.from_model(layer, ["attention_head", "ffn_hidden", "residual_branch"])
    with pytest.raises(
        ablate.ModelMismatchError, match=r"'linear2.weight' has shape \(8, 7\), expected 6 along axis 1"
    ):
        index.check(nn.TransformerEncoderLayer(8, 2, 7))


def test_only_a_residual_branch_takes_its_bias_along(layer: nn.Module) -> None:
    for kind in ALL:
        if kind != "conv_filter":
            ports = Index.from_model(layer, [kind]).ports
            assert {port.with_bias for port in ports} == {kind == "residual_branch"}


class _Attention(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.h = heads
        self.to_qkv = nn.Linear(8, 24, bias=False)
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Block(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.attention = _Attention(heads)
        self.grow = nn.Sequential(nn.Linear(8, 12), nn.GELU())
        self.shrink = nn.Sequential(nn.Dropout(0.1), nn.Linear(12, 8))


def test_modules_of_ones_own_are_made_known(registries: None) -> None:
    model = nn.Sequential(_Block(), _Block())
    for kind in ("attention_head", "ffn_hidden", "residual_branch"):
        with pytest.raises(ablate.SelectionError, match=f"no component of kind {kind}"):
            Index.from_model(model, [kind])
    ablate.register_attention(_Attention, qkv=["to_qkv"], out="to_out.0", heads="h")
    ablate.register_feed_forward(_Block, first=["grow.0"], second="shrink.1")
    assert Index.from_model(model, ["attention_head"]).expect(8)[7].name == "1.attention.to_out.0:attention_head[3]"
    Index.from_model(model, ["qkv_neuron"]).expect(48)
    Index.from_model(model, ["ffn_in"]).expect(24)
    Index.from_model(model, ["ffn_hidden"]).expect(24)
    Index.from_model(model, ["residual_branch"]).expect(4)  # found: an attention and a network in one block
    ablate.register_residual(_Block, ["shrink.1"])
    index = Index.from_model(model, ["residual_branch"]).expect(2)
    assert index[1].name == "1.shrink.1:residual_branch"


def test_a_registration_that_does_not_fit_is_named(registries: None) -> None:
    model = nn.Sequential(_Block(heads=3))
    ablate.register_attention(_Attention, qkv=["to_qkv"], out="to_out.0", heads="h")
    with pytest.raises(ablate.SelectionError) as caught:
        Index.from_model(model, ["attention_head"])
    assert str(caught.value) == (
        "Module '0.attention' is a _Attention, registered as an attention with qkv=['to_qkv'], out='to_out.0', "
        "heads='h', but these are not there or their shapes do not fit. Correct ablate.register_attention(...)."
    )
    ablate.register_attention(_Attention, qkv=["to_qkv"], out="to_out.0", heads="heads")
    with pytest.raises(ablate.SelectionError, match="heads='heads', but these are not there"):
        Index.from_model(model, ["attention_head"])


def test_other_registrations_that_do_not_fit(registries: None) -> None:
    ablate.register_feed_forward(_Block, first=["shrink.1"], second="grow")
    ablate.register_attention(_Attention, qkv=["to_qkv"], out="to_out.0", heads="h")
    with pytest.raises(ablate.SelectionError, match=r"Correct ablate.register_feed_forward\(...\)."):
        Index.from_model(_Block(), ["ffn_hidden"])
    ablate.register_feed_forward(_Block, first=["grow.0"], second="shrink.1")
    ablate.register_residual(_Block, ["grow.2"])
    with pytest.raises(ablate.SelectionError, match=r"the branch 'grow.2', which it has not"):
        Index.from_model(_Block(), ["residual_branch"])
    ablate.register_residual(_Block, ["grow.1"])
    with pytest.raises(ablate.SelectionError, match=r"'grow.1' ends in a GELU without a weight"):
        Index.from_model(_Block(), ["residual_branch"])


def test_a_string_where_a_list_is_meant() -> None:
    with pytest.raises(ablate.SelectionError, match=r"qkv is the string 'to_qkv', expected a list"):
        ablate.register_attention(_Attention, qkv="to_qkv", out="to_out.0", heads="h")
    with pytest.raises(ablate.SelectionError, match=r"first is the string 'a', expected a list"):
        ablate.register_feed_forward(_Block, first="a", second="b")
    with pytest.raises(ablate.SelectionError, match=r"branches is the string 'a', expected a list"):
        ablate.register_residual(_Block, "a")


class _Stage(nn.Module):
    """Looks like a residual block from far: it has a `downsample` and many convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Identity()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3)))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()),  # a squeeze-and-excitation
        nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid()),  # the same of linear layers
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)),  # an inverted bottleneck
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),  # a classifier
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),  # three alike: which would be the second?
        _Stage(),
    ],
)
def test_what_only_looks_like_it(model: nn.Module) -> None:
    for kind in ("attention_head", "ffn_hidden", "residual_branch"):
        with pytest.raises(ablate.SelectionError, match=f"no component of kind {kind}"):
            Index.from_model(model, [kind])


def test_a_branch_that_ends_in_frozen_statistics_cannot_be_silenced_by_weights() -> None:
    import torchvision

    model = torchvision.models.resnet18(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    with pytest.raises(ablate.SelectionError, match="no component of kind residual_branch"):
        Index.from_model(model, ["residual_branch"])


def test_finding_structure_reads_no_weight_and_draws_no_number(layer: nn.Module) -> None:
    before = torch.get_rng_state()
    Index.from_model(layer.to("meta"), ALL)
    assert torch.equal(torch.get_rng_state(), before)
