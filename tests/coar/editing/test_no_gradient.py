"""No gradient is no gradient of zero: what gets none keeps its bits and is named; if nothing gets one, it is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablate import ComponentIndex, Examples
from coar.editing.log import EditLog
from coar.editing.registry import get_editor
from coar.editing.request import Request
from coar.editing.training.descent import Descent, descend
from coar.errors import EditError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
REQUEST = Request(X, Y, validation=(Examples(X + 1, Y), Examples(X - 1, Y)))


class Probed(nn.Module):
    """A backbone that is run without gradients, two layers behind it."""

    def __init__(self, how: str = "no_grad") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.backbone = how, nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
        self.middle, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            features = self.backbone(x)
        features = features.detach() if self.how == "detach" else features
        logits: Tensor = self.head(self.middle(features).relu())
        return logits


@pytest.mark.parametrize("how", ["no_grad", "detach"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam", "rmsprop"])
def test_a_frozen_backbone_keeps_its_bits(how: str, optimizer: Any) -> None:
    model = Probed(how).eval()
    plan = {"rate": 1e-2, "warm_up": 1, "epochs": 5, "rule": "none", "weight_decay": 0.5, "penalty": "l2"}
    edit = get_editor("paint", optimizer=optimizer, penalty_weight=0.1, **plan).edit(model, REQUEST)
    edited = edit.apply(model)
    for name, value in edited.named_parameters():
        same = torch.equal(value, model.get_parameter(name))
        assert same == name.startswith(("backbone", "head")), name
    assert edit.details["log"]["without_gradient"] == [n for n, _ in model.named_parameters() if "backbone" in n]


def test_a_layer_without_any_gradient_is_refused() -> None:
    model = Probed().eval()
    selection = ComponentIndex.from_model(model, ["linear_neuron"]).where(module="backbone.0")
    with pytest.raises(EditError) as refused:
        get_editor("finetune", optimizer="adamw", weight_decay=0.5).edit(model, REQUEST, selection)
    assert str(refused.value) == (
        "The loss does not depend on 'backbone.0.weight': no gradient gets there, so training cannot change it. The "
        "model runs these layers under torch.no_grad(), detaches what they give, or does not use them. Let gradients "
        "through, or select layers behind that."
    )


def test_a_parameter_that_gets_a_gradient_now_and_then_moves_then() -> None:
    layer = nn.Linear(2, 2).double().requires_grad_(False)
    seen = []

    def loss() -> Tensor:
        seen.append(layer.bias.detach().clone())
        both = layer.weight.sum()
        return both + layer.bias.sum() if len(seen) == 2 else both

    log = EditLog()
    plan = Descent(optimizer="adamw", rate=0.1, steps=3, weight_decay=0.5)
    descend(layer, {"weight": None, "bias": None}, loss, plan, log)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], layer.bias)
    assert "without_gradient" not in log.entries


def test_terms_of_a_loss_may_each_reach_other_parameters() -> None:
    def terms(net: nn.Linear) -> tuple[Tensor, Tensor]:
        return net.weight.square().sum(), net.bias.sum() + net.weight.sum()

    one, other = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    other.load_state_dict(one.state_dict())
    for net, loss in ((one, lambda: sum(terms(one))), (other, lambda: terms(other))):
        net.requires_grad_(False)
        descend(net, {"weight": None, "bias": None}, loss, Descent(optimizer="sgd", rate=0.1, steps=2), EditLog())  # type: ignore[arg-type]
    torch.testing.assert_close(one.weight, other.weight)
    torch.testing.assert_close(one.bias, other.bias)


def test_a_function_without_a_backward_is_named() -> None:
    class Rounds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(Rounds.apply(self.first(x)))
            return logits

    model = Net().eval()
    selection = ComponentIndex.from_model(model, ["linear_neuron"]).where(module="first")
    with pytest.raises(EditError, match=r"^The gradient of the loss cannot be computed: "):
        get_editor("finetune").edit(model, REQUEST, selection)


@pytest.mark.parametrize("name", ["paint", "finetune", "1-li"])
def test_a_model_that_is_only_a_head(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(
        EditError, match=r"finds nothing to edit in this Sequential by itself: give a selection, e\.g\. of"
    ):
        get_editor(name).edit(model, REQUEST)
    everything = ComponentIndex.from_model(model, ["linear_neuron"], include=["1"]).everything()
    edit = get_editor(name, rate=1e-2, steps=3).edit(model, REQUEST, everything)
    edited = edit.at(1).apply(model)
    assert not torch.equal(edited.get_parameter("1.weight"), model.get_parameter("1.weight"))


def test_two_labels_for_one_input_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    log = get_editor("finetune", steps=2).edit(model, Request(X[[0, 1, 0]], torch.tensor([1, 2, 0]))).details["log"]
    assert log["stop"] == "max_steps"
    assert log["why"].endswith("inputs 0 and 2 are the same and their labels are 1 and 0: both cannot be learnt")
    assert " of 3 labels are predicted, the loss is " in log["why"]
