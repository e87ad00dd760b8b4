"""1-LI, PAINT and curves along alpha of any edit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Examples
from coar.editing.edits.operations import Delta, Scale
from coar.editing.methods.finetune import FineTuning
from coar.editing.methods.interpolation import OneLayerInterpolation, Paint, interpolation_curve
from coar.editing.predicting import predictions
from coar.editing.request import Request
from coar.metrics import Accuracy, MetricError, accuracy, is_convex

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]
SMALL: dict[str, Any] = {"rate": 1e-2, "epochs": 30, "warm_up": 3}


@pytest.fixture
def vit(randomise: Randomise) -> nn.Module:
    return randomise(timm.create_model("test_vit", num_classes=3, img_size=32), 4).eval()


@pytest.fixture
def wish(vit: nn.Module) -> Request:
    """Two images to be called what they are not, and as many like them and ordinary ones to choose alpha."""
    generator = torch.Generator().manual_seed(1)

    def images(count: int) -> Tensor:
        return torch.randn(count, 3, 32, 32, generator=generator)

    inputs, ordinary = images(2), images(12)
    with torch.no_grad():
        label = int(vit(inputs).topk(2).indices[0, 1])
        stays = Examples(ordinary, vit(ordinary).argmax(dim=1))
    near = inputs.repeat(3, 1, 1, 1) + 0.3 * images(6)
    return Request(inputs, torch.full((2,), label), validation=(Examples(near, [label] * 6), stays))


def _judged(model: nn.Module, sets: dict[str, Examples]) -> dict[str, Accuracy]:
    return {name: accuracy(predictions(model, examples), examples.targets) for name, examples in sets.items()}


def _sets(wish: Request) -> dict[str, Examples]:
    assert wish.validation is not None
    return {"original": wish.validation[1], "edited": wish.validation[0]}


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_defaults_are_those_of_the_published_code() -> None:
    for editor in (OneLayerInterpolation(), Paint()):
        assert (editor.optimizer, editor.weight_decay, editor.clip) == ("adamw", 0.1, 1.0)
        assert (editor.rate, editor.warm_up, editor.epochs, editor.batch_size) == (1e-5, 500, 10, 128)
        assert list(editor.alphas) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
        assert editor.stop_loss is None
        assert editor.rule == "mean"


def test_at_alpha_1_it_is_local_fine_tuning(vit: nn.Module, wish: Request) -> None:
    editor = OneLayerInterpolation(**SMALL)
    edit = editor.edit(vit, wish)
    own = {f.name for f in fields(FineTuning)}
    settings = {name: getattr(editor, name) for name in own}
    for scope in ("selection", "local"):
        tuned = FineTuning(**{**settings, "scope": scope}).edit(vit, wish, editor.default_selection(vit))
        assert tuned.operation == edit.operation
        assert _bits(edit.at(1).apply(vit)) == _bits(tuned.apply(vit))
    assert len(set(edit.selection.table()["module"])) == 1


@pytest.mark.parametrize("rule", ["mean", "cap"])
def test_alpha_is_chosen_on_validation_examples(rule: Any, vit: nn.Module, wish: Request, untouched: Untouched) -> None:
    sets = _sets(wish)
    with untouched(vit, wish.inputs):
        edit = OneLayerInterpolation(rule=rule, cap=60.0, **{**SMALL, "rate": 1e-3}).edit(vit, wish)
        curve = interpolation_curve(vit, edit, sets)
    choice = curve.choose(rule, 60.0)
    assert edit.alpha == choice.alpha == edit.details["alpha"]["chosen"]
    assert edit.details["alpha"]["protocol"] == choice.protocol
    assert edit.details["curve"] == curve.table().to_dict("list")
    # the rules, once more
    table = curve.table()
    if rule == "mean":
        worth = (table["original"] + table["edited"]) / 2
    else:
        worth = table["edited"].where(100 * (table["original"][0] - table["original"]) <= 60 + 1e-9)
    assert edit.alpha == table["alpha"][worth.fillna(-1).to_numpy().argmax()], "the first of the best"
    assert edit.alpha > 0


def test_no_strength_helps_then_it_is_the_original_model(vit: nn.Module, wish: Request) -> None:
    assert wish.validation is not None
    stays = wish.validation[1]
    hopeless = Request(wish.inputs, wish.labels, validation=(stays, stays))
    edit = OneLayerInterpolation(**SMALL).edit(vit, hopeless)
    assert edit.alpha == 0
    assert _bits(edit.apply(vit)) == _bits(vit)
    assert _bits(edit.at(1).apply(vit)) != _bits(vit), "the full edit is still there"


def test_without_a_rule_alpha_stays_1(vit: nn.Module, wish: Request) -> None:
    edit = OneLayerInterpolation(rule="none", **SMALL).edit(vit, wish)
    assert edit.alpha == 1
    assert "curve" not in edit.details


def test_paint_trains_all_but_the_head(vit: nn.Module, wish: Request) -> None:
    edit = Paint(rate=1e-4, epochs=10, warm_up=2).edit(vit, wish)
    after = edit.at(1).apply(vit).state_dict()
    changed = {name for name, value in vit.state_dict().items() if not torch.equal(value, after[name])}
    everything = {name for name, _ in vit.named_parameters()}
    assert changed == everything - {"head.weight", "head.bias"}
    assert edit.details["log"]["head"] == "head"
    assert edit.details["scope"] == "encoder"
    assert 0 <= edit.alpha <= 1


def test_paint_with_a_selection_trains_that(vit: nn.Module, wish: Request) -> None:
    index = ComponentIndex.from_model(vit, ["ffn_in"])
    selection = index.where(module="blocks.4.*").sample(50, 0)
    edit = Paint(**SMALL).edit(vit, wish, selection)
    assert edit.selection == selection
    assert not edit.operation.whole
    assert edit.details["scope"] == "selection"


def test_batch_norm_statistics_stay(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    pair = (Examples(images, labels), Examples(images, labels))
    edit = Paint(rate=1e-3, epochs=5, warm_up=1, batch_size=3).edit(conv_net, Request(images, labels, validation=pair))
    half = edit.at(0.5).apply(conv_net)
    for name, value in conv_net.named_buffers():
        found = half.get_buffer(name)
        assert torch.equal(found, value)
        assert found.dtype == value.dtype, "counts stay integers"
    assert edit.details["log"]["steps"] == 5 * 3
    assert "bn1.weight" in edit.operation.whole


def test_a_warm_up_for_more_inputs_is_noted(vit: nn.Module, wish: Request) -> None:
    assert OneLayerInterpolation().edit(vit, wish).details["log"]["warning"] == (
        "10 steps never leave the warm-up of 500: the rate ends at 2e-07 of 1e-05. Lower warm_up, or train longer."
    )


def test_the_ends_of_a_curve_are_the_two_models(vit: nn.Module, wish: Request, untouched: Untouched) -> None:
    sets = _sets(wish)
    edit = FineTuning(rate=1e-3).edit(vit, wish)
    with untouched(vit):
        curve = interpolation_curve(vit, edit, sets, [0, 0.25, 1])
    curve.check_ends(_judged(vit, sets), _judged(edit.apply(vit), sets))
    assert curve.values("edited")[-1] > curve.values("edited")[0]
    table = curve.table()
    assert isinstance(table, pd.DataFrame)
    assert list(table["alpha"]) == [0, 0.25, 1]
    assert list(table["original_examples"]) == [12] * 3


def test_a_curve_of_any_edit(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Of an ablation, too, with further sets beside the two; and beyond 1, if asked."""
    index = ComponentIndex.from_model(conv_net, ["conv_filter"])
    sets = {name: Examples(images, labels) for name in ("original", "edited", "shifted")}
    for edit in (coar.Edit(index.select([0, 5])), coar.Edit(index.select([0, 5]), Scale(3.0), alpha=0.5)):
        curve = interpolation_curve(conv_net, edit, sets, [0, 1, 1.5], extrapolate=True)
        assert set(curve.columns) == {"original", "edited", "shifted"}
        curve.check_ends(_judged(conv_net, sets), {})
        assert curve.columns["shifted"][1] == _judged(edit.at(1).apply(conv_net), sets)["shifted"]
        beyond = edit.at(1.5, extrapolate=True).apply(conv_net)
        assert curve.columns["shifted"][2] == _judged(beyond, sets)["shifted"]
    with pytest.raises(coar.EditError, match=r"alpha is 1\.5, expected 0"):
        interpolation_curve(conv_net, coar.Edit(index.select([0])), sets, [0, 1.5])


def test_bad_curves_are_named_before_any_work(images: Tensor, labels: Tensor, conv_net: nn.Module) -> None:
    edit = coar.Edit(ComponentIndex.from_model(conv_net, ["conv_filter"]).select([0]))
    one = {"original": Examples(images, labels)}
    conv_net.forward = None  # type: ignore[assignment]  # running it would raise
    with pytest.raises(MetricError) as refused:
        interpolation_curve(conv_net, edit, one)
    assert str(refused.value) == "There is no column 'edited', only 'original'. Give it."
    both = {**one, "edited": one["original"]}
    with pytest.raises(MetricError, match=r"alphas are \(0\.5, 1\.0\), expected rising numbers that start at 0"):
        interpolation_curve(conv_net, edit, both, [0.5, 1])


def test_going_back_and_forth_gives_the_same_model(vit: nn.Module, wish: Request) -> None:
    edit = FineTuning(rate=1e-3, steps=5, stop_loss=None).edit(vit, wish)
    first, half, last = (_bits(edit.at(alpha).apply(vit)) for alpha in (1, 0.5, 1))
    assert first == last
    assert half != first
    with edit.at(0.3).applied(vit):
        assert _bits(vit) not in (first, half)
    assert _bits(edit.at(0).apply(vit)) == _bits(vit)


def test_lerp_is_exact_where_the_formula_is_not() -> None:
    """`(1 - a) x + a x` is not x for many float32 x; what both ends share stays."""
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    where = {"w": torch.ones(10_000, dtype=torch.bool)}
    same = Delta.between({"w": x}, {"w": x.clone()}, where)
    y = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    other = Delta.between({"w": x}, {"w": y}, where)
    drifted = []
    for step in range(1, 10):
        alpha = step / 10
        assert torch.equal(same.change("w", x, where["w"], alpha), x)
        drifted.append(float(((1 - alpha) * x + alpha * x != x).float().mean()))
    assert drifted[4] == 0, "at a half"
    assert all(0.05 < share < 0.4 for share in drifted[:4] + drifted[5:])
    assert torch.equal(other.change("w", x, where["w"], 1.0), y)
    assert not torch.equal(x + 1.0 * (y - x), y)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_convex_along_an_edit_of_the_last_linear_layer(seed: int, randomise: Randomise) -> None:
    """Cross-entropy is convex in the logits, and those are linear in alpha."""
    net = randomise(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), seed).eval().double()
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, 12, generator=generator).double(), torch.randint(3, (20,), generator=generator)
    layer = ComponentIndex.from_model(net, ["linear_neuron"]).where(module="3")
    tuned = FineTuning(optimizer="adamw", rate=0.3, steps=15, stop_loss=None).edit(net, Request(x, y), layer)
    start = net.get_parameter("3.weight").detach()
    where = {"3.weight": torch.ones_like(start, dtype=torch.bool)}
    end = {"3.weight": start + 5 * torch.randn(3, 8, generator=generator).double()}
    anywhere = coar.Edit(layer, Delta.between({"3.weight": start}, end, where))
    alphas = [step / 20 for step in range(21)]
    for edit in (tuned, anywhere):
        losses = []
        for alpha in alphas:
            with edit.at(alpha).applied(net), torch.no_grad():
                losses.append(float(F.cross_entropy(net(x), y)))
        assert is_convex(alphas, losses)
        slope = losses[-1] - losses[-2]
        if slope <= 0:
            assert losses == sorted(losses, reverse=True), "it falls all the way if it still falls at the end"


def test_validation_is_needed(vit: nn.Module, wish: Request) -> None:
    for editor in (OneLayerInterpolation(**SMALL), Paint(**SMALL)):
        with pytest.raises(coar.EditError) as refused:
            editor.edit(vit, Request(wish.inputs, wish.labels))
        assert str(refused.value) == (
            f"{editor.title} cannot edit with this request:\n  validation is missing: a pair of ablate.Examples, (to "
            "be changed, ordinary), used for nothing else."
        )


def test_validation_that_the_model_does_not_take_is_named_before_training(vit: nn.Module, wish: Request) -> None:
    assert wish.validation is not None
    wrong = Examples(torch.zeros(2, 3, 32, 32), [0, 7])
    request = Request(wish.inputs, wish.labels, validation=(wish.validation[0], wrong.take([1])))
    with pytest.raises(coar.EditError, match="has label 7, the model has classes 0 to 2"):
        OneLayerInterpolation(epochs=10**9).edit(vit, request)


def test_settings_that_cannot_work_are_all_named() -> None:
    wrong: dict[str, Any] = {"rule": "best", "cap": -1.0, "alphas": (0.5, 1.0), "epochs": 0}
    with pytest.raises(coar.EditError) as refused:
        Paint(**wrong)
    assert str(refused.value) == (
        "These settings cannot work: epochs is 0, expected an integer from 1 or None; rule is 'best', expected one "
        "of mean, cap, none; cap is -1.0, expected percentage points from 0 to 100; alphas are (0.5, 1.0), expected "
        "rising numbers from 0 to at most 1."
    )
