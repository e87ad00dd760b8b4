"""The engine's numbers on a net with three weights: every one of them can be worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate

# rows: (a, b, c) kept; margin of class 0 at x = 1 is 2a + 3b + 5c + 1 (the bias stays when its filter goes)
KEEP = np.array(list(itertools.product([False, True], repeat=3)))
AT_ONE = [1, 6, 4, 9, 3, 8, 6, 11]
AT_TWO = [1, 11, 7, 17, 5, 15, 11, 21]


@pytest.fixture
def index(three_weights: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(three_weights, ["linear_neuron"], include=["hidden"]).expect(3)


@pytest.fixture
def inputs() -> Tensor:
    return torch.tensor([[1.0], [2.0], [1.0]])


def test_margin_under_each_keep(three_weights: nn.Module, index: ablate.ComponentIndex, inputs: Tensor) -> None:
    outputs = ablate.Engine(three_weights, index).outputs(KEEP, inputs, [0, 0, 1])
    assert outputs.dtype == torch.float32
    assert outputs.tolist() == [[one, two, -one] for one, two in zip(AT_ONE, AT_TWO, strict=True)]


def test_logit_under_each_keep(three_weights: nn.Module, index: ablate.ComponentIndex, inputs: Tensor) -> None:
    outputs = ablate.Engine(three_weights, index, "logit").outputs(KEEP, inputs, [0, 0, 1])
    assert outputs.tolist() == [[one, two, 0] for one, two in zip(AT_ONE, AT_TWO, strict=True)]


def test_loss_under_each_keep(three_weights: nn.Module, index: ablate.ComponentIndex, inputs: Tensor) -> None:
    outputs = ablate.Engine(three_weights, index, "loss", precision="float64").outputs(KEEP, inputs[:1], [0])
    expected = np.log1p(np.exp(-np.array(AT_ONE)))  # two classes, the other logit is 0
    np.testing.assert_allclose(outputs[:, 0].numpy(), expected, rtol=1e-10)


def test_reference_gives_the_same_numbers(
    three_weights: nn.Module, index: ablate.ComponentIndex, inputs: Tensor
) -> None:
    outputs = ablate.reference_outputs(three_weights, index, KEEP, inputs, torch.tensor([0, 0, 1]))
    assert outputs.tolist() == [[one, two, -one] for one, two in zip(AT_ONE, AT_TWO, strict=True)]


def test_ablated_gives_the_same_numbers(three_weights: nn.Module, index: ablate.ComponentIndex, inputs: Tensor) -> None:
    for keep, one, two in zip(KEEP, AT_ONE, AT_TWO, strict=True):
        with ablate.ablated(three_weights, index.select(np.flatnonzero(~keep))) as model, torch.no_grad():
            assert model(inputs).tolist() == [[one, 0], [two, 0], [one, 0]]
