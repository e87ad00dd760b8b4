"""Law 1 on nets that use their weights in every odd way: weight gating, activation gating and the reference agree."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate.engine.gated_model import Speed

Case = tuple[nn.Module, ablate.ComponentIndex, Tensor, Tensor, str]
SomeKeep = Callable[..., npt.NDArray[np.bool_]]
AS_GIVEN = Speed(fold=False, channels_last=False)


def _assert_close(got: Tensor, expected: Tensor, relative: float) -> None:
    assert got.shape == expected.shape
    difference = float((got - expected).abs().max()) / float(expected.abs().max())
    assert difference <= relative, difference


def test_weight_gating_is_literal_zeroing_bit_for_bit(odd_case: Case, some_keep: SomeKeep) -> None:
    model, index, inputs, targets, output = odd_case
    keep = some_keep(index, 6)
    expected = ablate.reference_outputs(model, index, keep, inputs, targets, output)
    assert float(expected.std(dim=0).min()) > 1e-3, "the keep-vectors must matter on every example"
    engine = ablate.Engine(model, index, output, mode="weight", speed=AS_GIVEN)
    assert torch.equal(engine.outputs(keep, inputs, targets), expected)
    _assert_close(ablate.Engine(model, index, output).outputs(keep, inputs, targets), expected, 1e-5)
    gates = torch.tensor(keep, dtype=torch.float32)
    assert torch.equal(engine.gated_outputs(gates, inputs, targets), expected)
    assert torch.equal(engine.outputs(keep, inputs, targets), expected), "whichever way the weights were set before"


@pytest.mark.parametrize(("precision", "relative"), [("float32", 1e-5), ("float64", 1e-10)])
def test_activation_gating_is_literal_zeroing(
    precision: str, relative: float, odd_case: Case, some_keep: SomeKeep
) -> None:
    model, index, inputs, targets, output = odd_case
    keep = some_keep(index, 6)
    exact = copy.deepcopy(model).double()
    expected = ablate.reference_outputs(exact, index, keep, inputs.double(), targets, output)
    for batch_size in (1, 2, 3, 5, 128):  # divisors of the length too, and several keep-vectors per forward
        engine = ablate.Engine(model, index, output, mode="activation", precision=precision, batch_size=batch_size)
        _assert_close(engine.outputs(keep, inputs, targets).double(), expected, relative)


def test_each_example_under_gates_of_its_own(odd_case: Case, some_keep: SomeKeep) -> None:
    model, index, inputs, targets, output = odd_case
    keep = some_keep(index, len(inputs), seed=1)
    exact = copy.deepcopy(model).double()
    expected = ablate.reference_outputs(exact, index, keep, inputs.double(), targets, output).diagonal()
    for batch_size in (2, 3, 5):
        engine = ablate.Engine(model, index, output, precision="float64", batch_size=batch_size)
        outputs = engine.example_outputs(keep.astype(np.float64), inputs, targets)
        _assert_close(outputs, expected, 1e-10)


def test_gates_of_any_value(odd_case: Case, slow_gradients: Callable[..., tuple[Tensor, Tensor]]) -> None:
    model, index, inputs, targets, output = odd_case
    gates = torch.randn(len(inputs), len(index), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, _ = slow_gradients(model, index, gates, inputs, targets, output)
    engine = ablate.Engine(model, index, output, precision="float64", batch_size=3)
    _assert_close(engine.example_outputs(gates, inputs, targets), expected, 1e-10)
    _assert_close(engine.gated_outputs(gates, inputs, targets).diagonal(), expected, 1e-10)
    by_gates = ablate.Engine(model, index, output, precision="float64", batch_size=3, mode="activation")
    _assert_close(by_gates.gated_outputs(gates, inputs, targets).diagonal(), expected, 1e-10)


def test_with_gates_open_it_is_the_plain_model(odd_case: Case) -> None:
    model, index, inputs, targets, output = odd_case
    with torch.no_grad():
        plain = ablate.Margin()(model.requires_grad_(False)(inputs), targets)
    keep = np.ones((1, len(index)), dtype=bool)
    engine = ablate.Engine(model, index, output, mode="weight", speed=AS_GIVEN)
    assert torch.equal(engine.outputs(keep, inputs, targets)[0], plain)
    _assert_close(engine.example_outputs(np.ones((len(inputs), len(index))), inputs, targets), plain, 1e-6)
    engine.outputs(~keep, inputs, targets)
    assert torch.equal(engine.outputs(keep, inputs, targets)[0], plain), "an earlier keep-vector must leave no trace"
