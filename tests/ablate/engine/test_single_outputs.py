"""Models with one number per example: binary classifiers, regression, and outputs of any shape with an own Output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
import coar

Z = torch.tensor([[2.0], [-0.5], [3.0], [0.0]])
LABELS = torch.tensor([1, 1, 0, 0])


@pytest.mark.parametrize("logits", [Z, Z[:, 0]])
def test_one_logit_by_hand(logits: Tensor) -> None:
    assert ablate.Logit()(logits, LABELS).tolist() == [2.0, -0.5, -3.0, 0.0]
    assert ablate.Margin()(logits, LABELS).tolist() == [2.0, -0.5, -3.0, 0.0]
    probability = torch.sigmoid(Z[:, 0])
    chance = torch.where(LABELS == 1, probability, 1 - probability)
    torch.testing.assert_close(ablate.LogProbability()(logits, LABELS), chance.log())
    torch.testing.assert_close(ablate.CrossEntropyLoss()(logits, LABELS), -chance.log())
    assert ablate.Value()(logits, LABELS).tolist() == [2.0, -0.5, 3.0, 0.0]


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


LABELLED = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.fixture(params=["(n, 1)", "(n,)"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)]
    return nn.Sequential(*layers, nn.Flatten(0)).eval() if request.param == "(n,)" else nn.Sequential(*layers).eval()


@pytest.fixture
def index(model: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(model)


@pytest.fixture
def keep(index: ablate.ComponentIndex) -> Any:
    return ablate.KeepPlan(len(index), 8, 0.4, seed=3).take(0, 8)


def _literally(model: nn.Module, index: ablate.ComponentIndex, keep: Any, inputs: Tensor) -> Tensor:
    rows = []
    for row in keep:
        with ablate.ablated(model, index.select(np.flatnonzero(~row))), torch.no_grad():
            rows.append(model(inputs).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("output", ["logit", "margin"])
@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_a_binary_classifier_is_signed_by_the_label(
    output: str, mode: str, model: nn.Module, index: ablate.ComponentIndex, keep: Any, inputs: Tensor
) -> None:
    expected = _literally(model, index, keep, inputs) * (2 * LABELLED - 1)
    found = ablate.Engine(model, index, output, mode=mode).outputs(keep, inputs, LABELLED)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_regression_needs_no_labels(
    mode: str, model: nn.Module, index: ablate.ComponentIndex, keep: Any, inputs: Tensor
) -> None:
    expected = _literally(model, index, keep, inputs)
    engine = ablate.Engine(model, index, "value", mode=mode)
    torch.testing.assert_close(engine.outputs(keep, inputs), expected)
    torch.testing.assert_close(engine.outputs(keep, ablate.Examples.unlabelled(inputs)), expected)
    torch.testing.assert_close(engine.outputs(keep, inputs, torch.arange(6) + 70), expected)  # labels are not looked at


def test_a_campaign_and_an_estimate_of_regression(
    model: nn.Module, index: ablate.ComponentIndex, keep: Any, inputs: Tensor
) -> None:
    spec = ablate.CampaignSpec(
        model=model, data=inputs, output="value", index=index, rows=8, ablate_fraction=0.4, seed=3
    )
    store = ablate.run(spec, MemoryStore(), progress=False)
    np.testing.assert_allclose(store.outputs[:], _literally(model, index, keep, inputs), rtol=1e-5, atol=1e-6)
    assert store.examples["label"].tolist() == [-1] * 6
    attributions = coar.estimate(model, (inputs, None), index=index, output="value", passes=8, quality_rows=0)
    assert attributions.weights[:].shape == (6, len(index))


def test_labels_that_one_logit_cannot_have(model: nn.Module, index: ablate.ComponentIndex, inputs: Tensor) -> None:
    with pytest.raises(ablate.LabelError) as caught:
        ablate.Engine(model, index).outputs(np.ones((1, 5), dtype=bool), inputs, [0, 1, 2, 0, 0, 0])
    assert str(caught.value) == (
        "The label of example 2 is 2, expected 0 or 1: the model has one logit, which says how much it is 1. Of a "
        "model that predicts a number take output='value', which needs no labels."
    )


def test_missing_labels_are_named_where_they_are_needed(
    model: nn.Module, index: ablate.ComponentIndex, inputs: Tensor
) -> None:
    with pytest.raises(ablate.DataError) as caught:
        ablate.Engine(model, index).outputs(np.ones((1, 5), dtype=bool), ablate.Examples.unlabelled(inputs))
    assert str(caught.value) == (
        "Labels are missing: give targets, one integer per example, beside the inputs. Or take an output that needs "
        "none, like output='value': output 'margin' does."
    )


def test_a_value_of_several_numbers_is_refused(mlp: nn.Module) -> None:
    engine = ablate.Engine(mlp, ablate.ComponentIndex.from_model(mlp), "value")
    with pytest.raises(ablate.DataError) as caught:
        engine.check(torch.randn(2, 4))
    assert str(caught.value) == (
        "The model returned shape (2, 3) for 2 examples, expected one number per example, shape (2,) or (2, 1) for "
        "output 'value'. Choose another output, or wrap the model so that it returns its logits."
    )


class Covered(ablate.Output):
    """How many pixels the map of a class covers, softly."""

    name = "covered"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.softmax(dim=1)[torch.arange(len(targets)), targets].sum(dim=(1, 2))


class SquaredError(ablate.Output):
    """Against true values that it holds; targets say which."""

    name = "squared_error"
    needs_labels = False

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.flatten() - self.truth[targets]) ** 2


def test_an_output_of_ones_own_sees_maps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    index = ablate.ComponentIndex.from_model(model)
    images, labels = torch.randn(5, 3, 6, 6), torch.tensor([0, 1, 1, 0, 1])
    keep = ~np.eye(len(index), dtype=bool)
    expected = []
    for row in keep:
        with ablate.ablated(model, index.select(np.flatnonzero(~row))), torch.no_grad():
            expected.append(Covered()(model(images), labels))
    for mode in ("weight", "activation"):
        found = ablate.Engine(model, index, Covered(), mode=mode).outputs(keep, images, labels)
        torch.testing.assert_close(found, torch.stack(expected))


def test_a_loss_against_true_values(model: nn.Module, index: ablate.ComponentIndex, keep: Any, inputs: Tensor) -> None:
    truth = torch.linspace(-1, 1, 6)
    found = ablate.Engine(model, index, SquaredError(truth)).outputs(keep, inputs, torch.arange(6))
    torch.testing.assert_close(found, (_literally(model, index, keep, inputs) - truth) ** 2)


class Careless(ablate.Output):
    name = "careless"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits[:, 7]


def test_an_output_that_fails_is_named(mlp: nn.Module) -> None:
    engine = ablate.Engine(mlp, ablate.ComponentIndex.from_model(mlp), Careless())
    with pytest.raises(ablate.DataError) as caught:
        engine.outputs(np.ones((1, len(engine.index)), dtype=bool), torch.randn(2, 4), [0, 1])
    assert str(caught.value) == (
        "Output 'careless' fails on what the model returns, shape (2, 3), and targets of shape (2,): IndexError: index "
        "7 is out of bounds for dimension 1 with size 3."
    )


def test_a_binary_classifier_is_edited_and_judged(model: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():
        before = (model(inputs).flatten() > 0).long()
    wanted = 1 - before
    edit = coar.get_editor("finetune", rate=0.05, steps=200, stop_loss=None).edit(
        model,
        coar.Request(inputs, wanted),
        ablate.ComponentIndex.from_model(model, ["linear_neuron"]).everything(),
    )
    report = coar.evaluate_edit(model, edit, {"all": ablate.Examples(inputs, wanted)}).sets["all"]
    assert report.kept.base.tolist() == before.tolist()
    with torch.no_grad():
        assert report.kept.edited[0].tolist() == (edit.apply(model)(inputs).flatten() > 0).long().tolist()
    assert report.after.value > report.before.value == 0.0
