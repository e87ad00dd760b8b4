"""What a scope trains, found from the order in which a forward pass uses parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import coar
from ablate import ComponentIndex
from coar.editing.where import scopes

Randomise = Callable[[nn.Module, int], nn.Module]
CONV_NET = ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias"]
CONV_NET += ["fc.weight", "fc.bias", "head.weight", "head.bias"]


class Backwards(nn.Module):
    """Its attributes are not in the order of execution; one is never used, one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        assert self.head.weight.dtype == x.dtype  # a look at it is no use
        x = self.twice(self.twice(x))
        x = self.attention(x, x, x, need_weights=False)[0] * self.gain
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


@pytest.fixture
def backwards(randomise: Randomise) -> nn.Module:
    return randomise(Backwards(), 1).eval()


def test_the_order_is_that_of_execution(conv_net: nn.Module, images: Tensor, backwards: nn.Module) -> None:
    assert scopes.order_of_use(conv_net, images) == CONV_NET
    assert scopes.order_of_use(backwards, torch.randn(2, 5, 4)) == [
        "twice.weight",
        "twice.bias",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
        "gain",
        "head.weight",
        "head.bias",
    ]


def test_the_order_in_a_transformer() -> None:
    net = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    order = scopes.order_of_use(net, torch.randn(1, 3, 32, 32))
    assert sorted(order) == sorted(name for name, _ in net.named_parameters())
    assert order[:4] == ["patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"]
    assert order[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert order.index("blocks.2.attn.qkv.weight") < order.index("blocks.2.mlp.fc1.weight")


def test_global_is_everything_from_the_first_selected_layer_on(conv_net: nn.Module, images: Tensor) -> None:
    index = ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    selection = index.where(module="fc") | index.where(module="conv2").sample(1, 0)
    scope = scopes.from_layer_on(selection, conv_net, images)
    assert list(scope.trained) == CONV_NET[4:]
    assert all(mask is None for mask in scope.trained.values())
    assert set(scope.selection.table()["module"]) == {"conv2", "fc", "head"}
    assert scope.whole == ("bn2.weight", "bn2.bias", "fc.bias", "head.bias")


def test_the_backward_side_has_weights_only(conv_net: nn.Module, images: Tensor) -> None:
    index = ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])
    scope = scopes.weights_up_to_layer(index.where(module="fc"), conv_net, images)
    assert list(scope.trained) == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert scope.whole == ()
    first = index.where(module="conv1")
    assert scopes.weights_up_to_layer(first.sample(1, 0), conv_net, images).selection == first


def test_tokens_and_positions_are_no_weights_of_layers() -> None:
    net = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    index = ComponentIndex.from_model(net, ["ffn_in"])
    scope = scopes.weights_up_to_layer(index.where(module="blocks.0.*"), net, torch.randn(1, 3, 32, 32))
    assert list(scope.trained) == [
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
    ]
    assert set(scope.selection.table()["module"]) == {"blocks.0.mlp.fc1"}
    assert scope.whole == tuple(list(scope.trained)[:3]), "what the index does not list is moved as a whole"


def test_the_head_is_the_layer_that_gives_the_logits(conv_net: nn.Module, images: Tensor, backwards: nn.Module) -> None:
    index = ComponentIndex.from_model(conv_net)
    scope, head = scopes.all_but_head(index.everything(), conv_net, images)
    assert (list(scope.trained), head) == (CONV_NET[:-2], "head")
    scope, head = scopes.all_but_head(ComponentIndex.from_model(backwards).everything(), backwards, torch.ones(1, 5, 4))
    assert head == "head"
    assert "unused.weight" not in scope.trained


def test_a_model_whose_logits_come_from_no_layer(conv_net: nn.Module, images: Tensor) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)[:, :2]
            return logits

    net = Summed().eval()
    scope, head = scopes.all_but_head(ComponentIndex.from_model(net).everything(), net, images)
    assert head is None
    assert len(scope.trained) == len(CONV_NET)


def test_a_layer_the_index_lists_in_part_is_moved_as_a_whole(conv_net: nn.Module, images: Tensor) -> None:
    index = ComponentIndex.from_model(conv_net, ["conv_filter"], include=["conv1"])
    scope = scopes.from_layer_on(index.everything(), conv_net, images)
    assert scope.selection == index.everything()
    assert set(scope.whole) == set(CONV_NET) - {"conv1.weight"}


def test_what_runs_nowhere_cannot_be_trained(backwards: nn.Module) -> None:
    index = ComponentIndex.from_model(backwards, ["linear_neuron"])
    with pytest.raises(coar.EditError) as refused:
        scopes.from_layer_on(index.where(module="unused"), backwards, torch.randn(1, 5, 4))
    assert str(refused.value) == (
        "A forward pass of the model does not use 'unused.weight': training cannot change its predictions."
    )


def test_local_is_one_layer(conv_net: nn.Module) -> None:
    index = ComponentIndex.from_model(conv_net, ["conv_filter"])
    assert scopes.whole_layer(index.select([4]), conv_net, "A method").selection == index.where(module="conv2")
    with pytest.raises(coar.EditError) as refused:
        scopes.whole_layer(index.everything(), conv_net, "A method")
    assert str(refused.value) == (
        "A method with scope 'local' trains the weight of one layer, the selection lies in 2: conv1.weight, "
        "conv2.weight. Select with index.where(module=...), or pass scope='selection'."
    )


def test_values_are_put_back_bit_for_bit(conv_net: nn.Module, images: Tensor) -> None:
    scope = scopes.from_layer_on(ComponentIndex.from_model(conv_net).everything(), conv_net, images)
    before = scope.values(conv_net)
    state = {name: value.clone() for name, value in conv_net.state_dict().items()}
    with torch.no_grad():
        for parameter in conv_net.parameters():
            parameter.mul_(1.1)
    moved = scope.operation(conv_net, before)
    assert set(moved.values) == set(CONV_NET)
    scope.put(conv_net, before)
    assert all(torch.equal(value, state[name]) for name, value in conv_net.state_dict().items())
    assert scope.weights(conv_net) == sum(p.numel() for p in conv_net.parameters())


class TiedWords(nn.Module):
    """Tokens to classes by the embedding itself, scaled; the head is the embedding in one of three ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.words = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.offset = nn.Parameter(torch.zeros(6))
        if how != "functional":
            self.head = nn.Linear(4, 6, bias=False)
        if how == "one parameter":
            self.head.weight = self.words.weight
        elif how == "one memory":
            self.head.weight.data = self.words.weight.data

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.hidden(self.words(x)).mean(dim=1))
        factor = self.scale.exp()  # before the head runs
        weight = self.words.weight if self.how == "functional" else self.head.weight
        logits: Tensor = factor * nn.functional.linear(x, weight) + self.offset
        return logits


@pytest.mark.parametrize(("how", "name"), [("one parameter", "head"), ("one memory", "head"), ("functional", "words")])
def test_a_tied_embedding_is_the_head(how: str, name: str) -> None:
    net = TiedWords(how).eval()
    index = ComponentIndex.from_model(net, ["linear_neuron"])
    scope, head = scopes.all_but_head(index.everything(), net, torch.tensor([[0, 1, 2]]))
    assert head == name
    assert list(scope.trained) == ["hidden.weight", "hidden.bias", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("how", ["one parameter", "functional"])
def test_from_a_layer_on_a_tied_head_is_used_again(how: str) -> None:
    net = TiedWords(how).eval()
    selection = ComponentIndex.from_model(net, ["linear_neuron"]).where(module="hidden")
    trained = list(scopes.from_layer_on(selection, net, torch.tensor([[0, 1, 2]])).trained)
    assert sorted(trained) == sorted(name for name, _ in net.named_parameters())
