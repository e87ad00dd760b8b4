"""Default components: what a forward pass uses, without the rows that make the classes, found by following values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ablate
from ablate.index.flow import Flow, flow_of, order_of_use, run_flow, seen_with, traced_flow


class Declared(nn.Module):
    """Declares its layers in another order than it uses them, and one that it does not use when evaluated."""

    def __init__(self, follow: bool = True) -> None:
        super().__init__()
        self.classifier, self.second, self.auxiliary = nn.Linear(6, 3), nn.Linear(8, 6), nn.Linear(8, 3)
        self.first = nn.Linear(12, 8)
        self.follow = follow

    def forward(self, x: Tensor) -> Any:
        if not self.follow and float(x.sum()) == 1e9:  # a symbol has no number
            return x
        x = self.first(x.flatten(1)).relu()
        logits = self.classifier(self.second(x).relu())
        return {"logits": logits, "auxiliary": self.auxiliary(x)} if self.training else logits


class TwoHeads(nn.Module):
    """The mean of two heads, as of distilled transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.distilled = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1)).relu()
        result: Tensor = (self.head(x) + self.distilled(x)) / 2
        return result


class Tied(nn.Module):
    """The weight of a layer makes the classes without the layer's forward, and a bare parameter is added."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(12))
        self.head, self.body = nn.Linear(8, 3), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.token.expand(x.shape[0], 12) + x.flatten(1)).relu()
        return F.linear(x, self.head.weight) * 2


class Residual(nn.Module):
    """Returns a sum that every layer adds to: features, no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x + self.first(x).relu()
        result: Tensor = x + self.second(x).relu()
        return result


def _all_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class ByViews(nn.Module):
    """Uses the weight of one layer by a view of it, and another's by something computed of it."""

    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        self.computed = computed
        self.first, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = 2 * self.first.weight if self.computed else self.first.weight
        logits: Tensor = self.head((x.flatten(1) @ weight.T).relu())
        return logits


def test_a_weight_that_is_used_by_a_view_is_used() -> None:
    flow = traced_flow(ByViews())
    assert flow is not None
    assert flow.order == ("first", "head")
    assert ablate.ComponentIndex.from_model(ByViews()).modules()["module"].tolist() == ["first"]


def test_nothing_is_claimed_where_something_is_computed_of_weights_alone() -> None:
    assert traced_flow(ByViews(computed=True)) is None
    assert ablate.ComponentIndex.from_model(ByViews(computed=True)).modules()["module"].tolist() == ["first"]


def _no_biases() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False)
    )


INPUTS = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "declared otherwise": (Declared, ("classifier",)),
    "two heads": (TwoHeads, ("distilled", "head")),
    "a tied head": (Tied, ("head",)),
    "residual features": (Residual, ()),
    "convolutions only": (_all_convolutions, ("2",)),
    "no biases": (_no_biases, ("4",)),
}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[str, ...]]:
    make, makers = MODELS[str(request.param)]
    return make().eval(), makers


def test_following_and_running_see_the_same(case: tuple[nn.Module, tuple[str, ...]]) -> None:
    model, makers = case
    traced, ran = traced_flow(model), run_flow(model, INPUTS)
    assert traced is not None
    assert sorted(traced.makers) == sorted(ran.makers) == sorted(makers)
    assert set(traced.order) == set(ran.order)
    with torch.no_grad():
        used = dict.fromkeys(name.rpartition(".")[0] for name in order_of_use(model, INPUTS))
    assert ran.order == tuple(used)


def test_nothing_is_touched(
    case: tuple[nn.Module, tuple[str, ...]], untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    model, _ = case
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, result: seen.append(result))
    forward = type(model).forward, nn.Module.__call__
    with untouched(model):
        traced_flow(model)
        run_flow(model, INPUTS)
    assert (type(model).forward, nn.Module.__call__) == forward
    assert len(seen) == 1  # of the copy that ran: a symbol never reaches a hook
    assert all(isinstance(value, Tensor) for value in vars(model)["_parameters"].values())


def _default(model: nn.Module, **arguments: Any) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(model, **arguments)


def _modules(index: ablate.ComponentIndex) -> list[str]:
    return list(dict.fromkeys(index.columns["module"]))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Declared, ["second", "first"]),
        (TwoHeads, ["body"]),
        (Tied, ["body"]),
        (Residual, ["first"]),  # the layer that is used last may make classes
        (_all_convolutions, ["0"]),
    ],
)
def test_the_default_holds_no_rows_of_classes(make: Callable[[], nn.Module], expected: list[str]) -> None:
    model = make()
    assert _modules(_default(model)) == expected
    assert _modules(_default(model.eval(), example_inputs=INPUTS)) == expected


def test_the_reasons_say_how_it_is_known() -> None:
    reasons = _default(Declared()).left_out().set_index("module")["reason"]
    assert reasons["classifier"] == "makes what the model returns, the classes: seen by following values"
    assert reasons["auxiliary"] == "a forward pass does not use it"
    reasons = _default(Declared(), example_inputs=INPUTS).left_out().set_index("module")["reason"]
    assert reasons["classifier"] == "makes what the model returns, the classes: seen by running example inputs"
    reasons = _default(Residual()).left_out().set_index("module")["reason"]
    assert reasons["second"] == (
        "the linear layer that is used last, and may make the classes: seen by following values"
    )


def test_where_a_model_cannot_be_followed_all_that_may_make_the_classes_is_left_out() -> None:
    model = Declared(follow=False).eval()
    assert flow_of(model) is None
    index = _default(model)
    assert _modules(index) == ["second"]
    reasons = index.left_out().set_index("module")["reason"]
    guessed = "the model could not be followed: give example_inputs to find out by running it"
    assert reasons["first"] == (f"the linear layer declared last, taken for the one that makes the classes; {guessed}")
    assert reasons["classifier"] == f"no layer reads its outputs, so it may make the classes; {guessed}"
    assert _modules(_default(model, example_inputs=INPUTS)) == ["second", "first"]
    with seen_with(model, INPUTS):
        assert _modules(_default(model)) == ["second", "first"]
        assert flow_of(Declared(follow=False).eval()) is None  # another model


def test_two_heads_that_cannot_be_followed_are_both_left_out() -> None:
    class Asking(TwoHeads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) < 1e9 else -x)

    assert _modules(_default(Asking())) == ["body"]


def test_example_inputs_that_the_model_does_not_take_are_named() -> None:
    with pytest.raises(ablate.DataError, match=r"^The model fails on example_inputs: RuntimeError: mat1 and mat2 "):
        _default(Declared(), example_inputs=torch.zeros(1, 5))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1)])
def test_a_model_that_is_only_its_classes_has_no_default(layer: nn.Module) -> None:
    with pytest.raises(ablate.SelectionError) as caught:
        _default(nn.Sequential(layer, nn.Flatten()))
    kind = "linear_neuron" if isinstance(layer, nn.Linear) else "conv_filter"
    assert "Left out: '0' (makes what the model returns, the classes: seen by following values)." in str(caught.value)
    assert f"in this model: {kind}" in str(caught.value)
    assert len(_default(nn.Sequential(layer), kinds=[kind])) == 3


def test_a_position_of_what_is_not_used_is_behind_all() -> None:
    flow = Flow(("a", "b"), (), "by hand")
    assert [flow.position(name) for name in ("a", "b", "c")] == [0, 1, 2]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "mobilenet_v3_small"])
def test_defaults_of_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    expected = [n for n in convolutions if not (name == "squeezenet1_0" and n == "classifier.1")]
    assert _modules(_default(model)) == expected


def test_heads_that_serve_training_only_are_no_default() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.googlenet(init_weights=False, num_classes=5)
    index = _default(model)
    assert not any(name.startswith(("aux1", "aux2")) for name in _modules(index))
    assert "inception5b.branch4.1.conv" in _modules(index)
