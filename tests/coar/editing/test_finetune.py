"""Fine-tuning on labels: scopes, presets step by step, stopping, and what it must not touch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Examples
from coar.editing.edits.covered import covered
from coar.editing.methods.finetune import SANTURKAR_GRID, YANG_PENALTIES, FineTuning
from coar.editing.request import Request

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def wish(images: Tensor, labels: Tensor) -> Request:
    """Three images that should be class 2."""
    return Request(images[:3], torch.tensor([2, 2, 2]))


@pytest.fixture
def vit(randomise: Randomise) -> nn.Module:
    return randomise(timm.create_model("test_vit", num_classes=3, img_size=32), 4).eval()


def _changed(model: nn.Module, edited: nn.Module) -> set[str]:
    after = edited.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, after[name])}


def _by_hand(
    model: nn.Module, names: list[str], request: Request, optimizer: Callable[..., Any], steps: int, **settings: Any
) -> dict[str, Tensor]:
    """Returns trained parameters after plain PyTorch training of some parameters; the model's are put back."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = [model.get_parameter(name) for name in names]
    optimiser = optimizer(chosen, **settings)
    for _ in range(steps):
        optimiser.zero_grad()
        assert request.labels is not None
        loss = F.cross_entropy(model(request.inputs), request.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    after = {name: model.get_parameter(name).detach().clone() for name in names}
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    return after


def test_the_defaults_are_yangs() -> None:
    editor = FineTuning()
    assert (editor.optimizer, editor.rate, editor.steps, editor.stop_loss) == ("rmsprop", 2e-5, 100, 0.01)
    assert (editor.penalty, editor.scope, editor.first_step) == ("none", "selection", "same")
    code = FineTuning.yang(0.005)
    assert (code.penalty, code.penalty_weight, code.first_step) == ("l1", 0.005, "sgd")
    assert FineTuning.yang().penalty_weight == YANG_PENALTIES[0] == 0
    assert FineTuning.yang(0.1, "l2").penalty == "l2"


def test_by_default_a_transformer_is_edited_in_blocks_8_to_10_of_12(randomise: Randomise) -> None:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, embed_dim=24, num_heads=3).eval()
    table = FineTuning().default_selection(net).table()
    assert sorted(set(table["parameter"])) == [
        f"blocks.{b}.mlp.{layer}.weight" for b in (7, 8, 9) for layer in ("fc1", "fc2")
    ]
    assert table["n_parameters"].sum() == 3 * 2 * 24 * 96


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_it_teaches_the_labels_and_touches_nothing_else(
    kind: str, conv_net: nn.Module, vit: nn.Module, untouched: Untouched
) -> None:
    model, size = (conv_net, 8) if kind == "cnn" else (vit, 32)
    request = Request(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 1]))
    editor = FineTuning(rate=1e-3) if kind == "vit" else FineTuning(rate=3e-3, scope="global")
    with untouched(model, request.inputs):
        edit = editor.edit(model, request)
    edited = edit.apply(model)
    with torch.no_grad():
        assert (model(request.inputs).argmax(dim=1) != 1).any()
        logits = edited(request.inputs)
    assert (logits.argmax(dim=1) == 1).all()
    assert float(F.cross_entropy(logits, torch.tensor([1, 1]))) <= 0.01
    assert edit.details["log"]["stop"] == "converged"
    assert edit.details["log"]["steps"] < 100
    assert _changed(model, edited) == {*covered(edit.selection, model), *edit.operation.whole}


def test_rmsprop_step_by_step(conv_net: nn.Module, wish: Request) -> None:
    names = ["conv1.weight", "conv2.weight"]
    expected = _by_hand(conv_net, names, wish, torch.optim.RMSprop, 7, lr=2e-5)
    edit = FineTuning(steps=7).edit(conv_net, wish)
    for name, value in edit.changed_weights(conv_net).items():
        assert torch.equal(value, expected[name])
    assert list(edit.changed_weights(conv_net)) == names


def test_half_of_the_filters(conv_net: nn.Module, wish: Request) -> None:
    """The gradient is masked: the rest keeps its bits, and each filter's first step is as if all were trained."""
    index = ComponentIndex.from_model(conv_net, ["conv_filter"])
    selection = index.select([0, 3, 5, 9])
    several: list[dict[str, Any]] = [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"penalty": "l2", "penalty_weight": 1},
    ]
    for settings in several:
        edit = FineTuning(rate=1e-3, steps=9, **settings).edit(conv_net, wish, selection)
        masks = covered(selection, conv_net)
        assert set(edit.changed_weights(conv_net)) == set(masks) == {"conv1.weight", "conv2.weight"}
        for name, value in edit.changed_weights(conv_net).items():
            before = conv_net.get_parameter(name)
            assert torch.equal(value[~masks[name]], before[~masks[name]])
            assert (value[masks[name]] != before[masks[name]]).any()
    one = FineTuning(steps=1).edit(conv_net, wish, selection).changed_weights(conv_net)
    full = FineTuning(steps=1).edit(conv_net, wish, index.everything()).changed_weights(conv_net)
    for name, mask in covered(selection, conv_net).items():
        assert torch.equal(one[name][mask], full[name][mask])


def test_nothing_is_done_where_the_label_is_predicted_already(conv_net: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        conv_net.get_parameter("head.weight").mul_(100)
        conv_net.get_parameter("head.bias").mul_(100)
        predicted = conv_net(images[:2]).argmax(dim=1)
        assert float(F.cross_entropy(conv_net(images[:2]), predicted)) <= 0.01
    edit = FineTuning().edit(conv_net, Request(images[:2], predicted))
    assert (edit.details["log"]["stop"], edit.details["log"]["steps"]) == ("noop", 0)
    assert not _changed(conv_net, edit.apply(conv_net))
    assert edit.describe()["relative_change"].max() == 0
    wrong = FineTuning(rate=1e-3).edit(conv_net, Request(images[:2], (predicted + 1) % 3))
    assert wrong.details["log"]["steps"] > 0


def test_a_small_loss_with_a_wrong_label_is_not_enough(conv_net: nn.Module, images: Tensor) -> None:
    """Both are asked: every label predicted, and the mean loss small."""
    with torch.no_grad():
        low = conv_net(images[:3]).argmax(dim=1)
    low[0] = (low[0] + 1) % 3
    edit = FineTuning(stop_loss=1e6, steps=3).edit(conv_net, Request(images[:3], low))
    assert edit.details["log"]["steps"] == 3


def test_a_penalty_so_large_that_nothing_is_learnt_is_no_error(conv_net: nn.Module, wish: Request) -> None:
    edit = FineTuning(optimizer="sgd", rate=1e-7, steps=30, penalty="l2", penalty_weight=1e6).edit(conv_net, wish)
    assert edit.details["log"]["stop"] == "max_steps"
    assert edit.describe()["relative_change"].max() < 1e-6


def test_the_log_says_how_much_did_not_move(conv_net: nn.Module, wish: Request) -> None:
    shares = {}
    settings: dict[str, Any] = {"optimizer": "sgd", "rate": 1e-2, "steps": 50, "stop_loss": None}
    for penalty in ("none", "l1"):
        editor = FineTuning.yang(0.1 if penalty == "l1" else 0.0, **settings)
        edit = editor.edit(conv_net, wish)
        shares[penalty] = edit.details["log"]["unmoved_share"]
        assert edit.details["log"]["trained_weights"] == 4 * 27 + 6 * 18
    assert 0 <= shares["none"] < 1
    assert shares["l1"] >= shares["none"]


def test_local_is_the_selection_of_the_whole_layer(conv_net: nn.Module, wish: Request) -> None:
    index = ComponentIndex.from_model(conv_net, ["conv_filter"])
    local = FineTuning(rate=1e-3, scope="local").edit(conv_net, wish, index.select([5]))
    whole = FineTuning(rate=1e-3).edit(conv_net, wish, index.where(module="conv2"))
    assert (local.selection, local.operation) == (whole.selection, whole.operation)
    assert _changed(conv_net, local.apply(conv_net)) == {"conv2.weight"}


def test_global_reaches_from_the_layer_to_the_logits(conv_net: nn.Module, wish: Request) -> None:
    index = ComponentIndex.from_model(conv_net, ["conv_filter"])
    edit = FineTuning.santurkar("global", rate=1e-2, steps=5).edit(conv_net, wish, index.where(module="conv2"))
    names = ["conv2.weight", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias", "head.weight", "head.bias"]
    expected = _by_hand(conv_net, names, wish, torch.optim.SGD, 5, lr=1e-2)
    edited = edit.apply(conv_net)
    assert _changed(conv_net, edited) == set(names), "running statistics stay, too"
    for name in names:
        assert torch.equal(edited.get_parameter(name), expected[name]), name
    assert edit.selection == index.where(module="conv2")
    assert set(edit.operation.whole) == set(names[1:])


@pytest.mark.parametrize("bias", [False, True])
def test_global_from_the_last_layer_is_local_if_it_has_no_bias(bias: bool, wish: Request) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias)).eval()
    index = ComponentIndex.from_model(net, ["linear_neuron"])
    edits = [
        FineTuning(scope=scope, rate=1e-3, stop_loss=None).edit(net, wish, index.where(module="3"))
        for scope in ("local", "global")
    ]
    assert (edits[0].operation == edits[1].operation) is not bias
    assert edits[0].selection == edits[1].selection


def test_the_encoder_is_all_but_the_head(conv_net: nn.Module, wish: Request) -> None:
    edit = FineTuning(scope="encoder", rate=1e-3, steps=3, stop_loss=None).edit(conv_net, wish)
    every = {name for name, _ in conv_net.named_parameters()}
    assert _changed(conv_net, edit.apply(conv_net)) == every - {"head.weight", "head.bias"}
    assert edit.details["log"]["head"] == "head"


def test_santurkars_baseline_is_plain_gradient_descent(conv_net: nn.Module, wish: Request) -> None:
    editor = FineTuning.santurkar()
    assert (editor.optimizer, editor.momentum, editor.weight_decay, editor.scope) == ("sgd", 0, 0, "local")
    assert (editor.rate, editor.steps) in SANTURKAR_GRID
    expected = _by_hand(conv_net, ["conv2.weight"], wish, torch.optim.SGD, 20, lr=1e-2)
    edit = FineTuning.santurkar(rate=1e-2, steps=20).edit(conv_net, wish)
    assert torch.equal(edit.changed_weights(conv_net)["conv2.weight"], expected["conv2.weight"])
    assert edit.details["log"]["steps"] == 20
    with pytest.raises(coar.EditError) as refused:
        editor.edit(conv_net, Request(wish.inputs, torch.tensor([2, 0, 2])))
    assert str(refused.value) == (
        "The labels are 0, 2, but these settings (one_label) take one label for all inputs, as the paper does. Pass "
        "one_label=False, or inputs of one label."
    )


def test_browns_baseline_has_momentum_and_decay_of_weights(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    request = Request(images, labels)
    names = ["fc.weight", "fc.bias", "head.weight", "head.bias"]
    weights, biases = names[::2], names[1::2]
    groups = [
        {"params": [conv_net.get_parameter(n) for n in part], "weight_decay": decay}
        for part, decay in ((weights, 1e-4), (biases, 0.0))
    ]
    expected = _by_hand(
        conv_net, names, request, lambda _, **kw: torch.optim.SGD(groups, **kw), 6, lr=0.1, momentum=0.9
    )
    index = ComponentIndex.from_model(conv_net, ["linear_neuron"])
    editor = FineTuning.brown(0.1, "global", steps=6, early_stopping=False)
    edited = editor.edit(conv_net, request, index.where(module="fc")).apply(conv_net)
    for name in names:
        torch.testing.assert_close(edited.get_parameter(name).detach(), expected[name], rtol=0, atol=1e-7)


def test_yangs_first_step_is_a_plain_one(conv_net: nn.Module, wish: Request) -> None:
    expected = _by_hand(conv_net, ["conv1.weight", "conv2.weight"], wish, torch.optim.SGD, 1, lr=2e-5)
    edit = FineTuning.yang(0.1, steps=1).edit(conv_net, wish)
    for name, value in edit.changed_weights(conv_net).items():
        assert torch.equal(value, expected[name])


def test_early_stopping_keeps_the_best_weights(conv_net: nn.Module, images: Tensor) -> None:
    request = Request(images[:3], torch.tensor([2, 2, 2]))
    changed = Examples(images[:3], [2, 2, 2])
    pair = (changed, Examples(images[3:], [0, 1, 2, 0]))
    with torch.no_grad():
        start = float((conv_net(images[:3]).argmax(dim=1) == 2).float().mean())
    request = Request(request.inputs, request.labels, validation=pair)
    edit = FineTuning.brown(0.05, steps=200, patience=10).edit(conv_net, request)
    found = edit.details["log"]["early_stopping"]
    with torch.no_grad():
        end = float((edit.apply(conv_net)(images[:3]).argmax(dim=1) == 2).float().mean())
    assert end == found["best_accuracy"] > start
    assert edit.details["log"]["stop"] == "converged"
    assert edit.details["log"]["steps"] == found["best_step"] + 10, "patience"
    assert found["scores"] == edit.details["log"]["steps"] + 1
    again = FineTuning.brown(0.05, steps=found["best_step"], early_stopping=False).edit(conv_net, request)
    assert again.operation == edit.operation, "the weights of the best step"


def test_early_stopping_where_nothing_helps(conv_net: nn.Module, images: Tensor) -> None:
    """Accuracy falls below half of its best: it stops, and the best are the original weights."""
    with torch.no_grad():
        predicted = conv_net(images).argmax(dim=1)
    other = (predicted[:3] + 1) % 3
    ordinary = Examples(images, predicted)
    request = Request(images[:3], other, validation=(Examples(images[:3], predicted[:3]), ordinary))
    edit = FineTuning.brown(0.5, steps=300, patience=300).edit(conv_net, request)
    log = edit.details["log"]
    assert (log["stop"], log["early_stopping"]["why"], log["early_stopping"]["best_step"]) == ("failed", "fell", 0)
    assert log["why"] == "No step raised accuracy on the validation examples: the weights are the original ones."
    assert log["steps"] < 300
    assert not _changed(conv_net, edit.apply(conv_net))


def test_early_stopping_needs_validation(conv_net: nn.Module, wish: Request) -> None:
    with pytest.raises(coar.EditError) as refused:
        FineTuning.brown(0.1).edit(conv_net, wish)
    assert str(refused.value) == (
        "early_stopping needs validation, a pair of ablate.Examples, (to be changed, ordinary), in the request. Give "
        "it, or pass early_stopping=False."
    )


def test_batches_and_epochs(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    request = Request(images, labels)
    settings: dict[str, Any] = {"rate": 1e-3, "epochs": 3, "stop_loss": None}
    edit = FineTuning(batch_size=2, **settings).edit(conv_net, request)
    assert edit.details["log"]["steps"] == 3 * 4, "7 inputs in batches of 2"
    assert edit.operation == FineTuning(batch_size=2, **settings).edit(conv_net, request).operation
    assert edit.operation != FineTuning(batch_size=2, seed=1, **settings).edit(conv_net, request).operation
    whole = FineTuning(**settings).edit(conv_net, request)
    assert whole.details["log"]["steps"] == 3
    assert whole.operation == FineTuning(batch_size=99, **settings).edit(conv_net, request).operation


def test_a_warm_up_that_is_never_left_is_noted(conv_net: nn.Module, wish: Request) -> None:
    editor = FineTuning(schedule="warm-up-cosine", warm_up=500, rate=1e-5, steps=235)
    assert editor.edit(conv_net, wish).details["log"]["warning"] == (
        "235 steps never leave the warm-up of 500: the rate ends at 4.7e-06 of 1e-05. Lower warm_up, or train longer."
    )
    enough = FineTuning(schedule="warm-up-cosine", warm_up=2, rate=1e-5, steps=3).edit(conv_net, wish)
    assert "warning" not in enough.details["log"]


def test_a_rate_that_is_too_high_is_named(conv_net: nn.Module, wish: Request, untouched: Untouched) -> None:
    editor = FineTuning(optimizer="sgd", rate=1e30, scope="global", stop_loss=None)
    with untouched(conv_net), pytest.raises(coar.EditError, match=r"the training diverged\. Lower the rate"):
        editor.edit(conv_net, wish)


def test_settings_that_cannot_work_are_all_named() -> None:
    wrong: dict[str, Any] = {
        "scope": "everything",
        "schedule": "linear",
        "epochs": 0,
        "batch_size": 0,
        "patience": 0,
        "warm_up": -1,
        "stop_loss": -1.0,
        "penalty_weight": 0.1,
        "rate": 0.0,
    }
    with pytest.raises(coar.EditError) as refused:
        FineTuning(**wrong)
    assert str(refused.value) == (
        "These settings cannot work: scope is 'everything', expected one of selection, local, global, encoder; rate "
        "is 0.0, expected a number above 0; epochs is 0, expected an integer from 1 or None; batch_size is 0, "
        "expected an integer from 1 or None; schedule is 'linear', expected one of constant, warm-up-cosine; "
        "warm_up is -1, expected an integer from 0; stop_loss is -1.0, expected a number from 0 or None; patience "
        "is 0, expected an integer from 1; penalty_weight is 0.1 without a penalty: pass penalty='l1' or 'l2'."
    )
    with pytest.raises(coar.EditError, match="warm_up belongs to schedule='warm-up-cosine'"):
        FineTuning(warm_up=5)


def test_every_setting_is_documented() -> None:
    text = FineTuning.__doc__ or ""
    assert [f.name for f in fields(FineTuning) if f.name != "seed" and f"{f.name}" not in text] == []
