"""What every estimator promises, asked of every registered one on a CNN, a ViT and an MLP.

A new estimator needs nothing here but its name in the registry; if it samples, or is not exact on a linear network, say
so below.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from coar.errors import FitError
from coar.estimators.abstract import BlockEstimate, Estimator
from coar.estimators.registry import estimator_names, get_estimator

Randomise = Callable[[nn.Module, int], nn.Module]
Untouched = Callable[..., AbstractContextManager[None]]
LABELS = [0, 1, 2, 2, 1, 0, 1]
NOT_COMPLETE = {"gradient": "predicts best under random keep-vectors, not with everything kept"}
NOT_EXACT = {
    "random": "knows nothing of the model",
    "internal_influence": "is per unit of activation, not in units of the output",
}


class Attention(nn.Module):
    """A small ViT: patches, attention and a feed-forward network beside residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(x)))
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class Flat(nn.Module):
    """An MLP of images."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.mlp(x.flatten(1)[:, :4])
        return logits


@pytest.fixture(params=["cnn", "vit", "mlp"])
def model(request: pytest.FixtureRequest, conv_net: nn.Module, mlp: nn.Module, randomise: Randomise) -> nn.Module:
    if request.param == "vit":
        return randomise(Attention(), 0).eval()
    return conv_net if request.param == "cnn" else Flat(mlp)


@pytest.fixture
def index(model: nn.Module) -> ablate.ComponentIndex:
    kinds = ["conv_filter", "linear_neuron"]
    return ablate.ComponentIndex.from_model(
        model, [*kinds, "attention_head"] if isinstance(model, Attention) else kinds[isinstance(model, Flat) :]
    )


@pytest.fixture(params=estimator_names())
def estimator(request: pytest.FixtureRequest) -> Estimator:
    return get_estimator(request.param)


@pytest.fixture
def examples(images: Tensor) -> ablate.Examples:
    return ablate.Examples(images, LABELS)


def _same(one: BlockEstimate, two: BlockEstimate) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("weights", "stderr", "bias", "passes")
    )


def test_shapes_and_types(
    estimator: Estimator, model: nn.Module, index: ablate.ComponentIndex, examples: ablate.Examples
) -> None:
    found = estimator.estimate(ablate.Engine(model, index), examples, 0, 0)
    for name in ("weights", "stderr", "bias", "passes"):
        value = getattr(found, name)
        expected = (7, len(index)) if name in ("weights", "stderr") else (7,)
        assert (value.shape, value.dtype) == (expected, np.float32), name
        assert np.isfinite(value).all(), name
    assert found.weights.any()
    assert (found.stderr >= 0).all()
    assert (found.passes >= 1).all()
    assert estimator.memory(len(index)) >= 8 * len(index), "weights and standard errors alone"


def test_nothing_is_changed(
    estimator: Estimator, model: nn.Module, index: ablate.ComponentIndex, images: Tensor, untouched: Untouched
) -> None:
    targets = torch.tensor(LABELS)
    with untouched(model, images, targets):
        estimator.estimate(ablate.Engine(model, index), ablate.Examples(images, targets), 0, 0)


def test_the_same_seed_gives_the_same_bits(
    estimator: Estimator, model: nn.Module, index: ablate.ComponentIndex, examples: ablate.Examples
) -> None:
    engine = ablate.Engine(model, index)
    first = estimator.estimate(engine, examples, 14, 3)
    estimator.estimate(engine, examples, 0, 4)
    assert _same(estimator.estimate(engine, examples, 14, 3), first)
    assert _same(estimator.estimate(ablate.Engine(model, index), examples, 14, 3), first)


def test_batches_change_rounding_only(
    estimator: Estimator, model: nn.Module, index: ablate.ComponentIndex, examples: ablate.Examples
) -> None:
    by = {
        size: estimator.estimate(ablate.Engine(model, index, precision="float64", batch_size=size), examples, 0, 0)
        for size in (1, 3, 128)
    }
    for found in by.values():
        np.testing.assert_allclose(found.weights, by[128].weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.bias, by[128].bias, rtol=1e-5, atol=1e-5)


def test_with_everything_kept_the_prediction_is_the_output(
    estimator: Estimator, model: nn.Module, index: ablate.ComponentIndex, examples: ablate.Examples
) -> None:
    found = estimator.estimate(ablate.Engine(model, index), examples, 0, 0)
    with torch.no_grad():
        full = ablate.Margin()(model(examples.inputs()), examples.targets).numpy()
    predicted = found.bias.astype(np.float64) + found.weights.sum(axis=1, dtype=np.float64)
    if estimator.name in NOT_COMPLETE:
        assert np.abs(predicted - full).max() > 1e-3, f"{estimator.name} {NOT_COMPLETE[estimator.name]}"
        np.testing.assert_allclose(predicted, full, atol=0.2 * np.abs(full).max())
    else:
        np.testing.assert_allclose(predicted, full, rtol=1e-4, atol=1e-4)


def test_a_linear_network_is_exact(estimator: Estimator) -> None:
    """Two layers without anything between, one of them ablated: `w_i` is what unit i adds to the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double().eval()
    inputs = torch.randn(7, 5, dtype=torch.float64)
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["0"])
    engine = ablate.Engine(model, index, "logit", precision="float64")
    found = estimator.estimate(engine, ablate.Examples(inputs, LABELS), 0, 0)
    first, second = model.get_parameter("0.weight").detach(), model.get_parameter("1.weight").detach()
    expected = ((inputs @ first.T) * second[LABELS]).numpy()
    difference = np.abs(found.weights - expected).max()
    if estimator.name in NOT_EXACT:
        assert difference > 0.1, f"{estimator.name} {NOT_EXACT[estimator.name]}"
    else:
        assert difference < 1e-6


def test_an_empty_index_is_refused(estimator: Estimator, mlp: nn.Module) -> None:
    engine = ablate.Engine(mlp, ablate.ComponentIndex([]))
    with pytest.raises(FitError) as caught:
        estimator.estimate(engine, ablate.Examples(torch.randn(2, 4), [0, 1]), 0, 0)
    assert str(caught.value) == (
        "The engine's index has no components: there is nothing to attribute to. Make one with "
        "ComponentIndex.from_model(model), or widen its kinds or include."
    )


def test_the_description_is_json_that_makes_an_equal_estimator(estimator: Estimator) -> None:
    text = json.dumps(estimator.describe(), allow_nan=False)
    assert get_estimator(**json.loads(text)) == estimator
    assert estimator.describe()["method"] == estimator.name


def test_settings_are_described(estimator: Estimator) -> None:
    if "steps" in estimator.describe():
        other = get_estimator(estimator.name, steps=7)
        assert other != estimator
        assert get_estimator(**json.loads(json.dumps(other.describe()))) == other
