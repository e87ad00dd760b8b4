"""The ways of setting weights: by rows on the CPU, by a product elsewhere, with care where weights are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ablate
from ablate.gating.weights import WeightGates


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes weight gating take the way it takes on a device other than the CPU."""
    made = WeightGates.__init__

    def init(self: WeightGates, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        self._on_cpu = False

    monkeypatch.setattr(WeightGates, "__init__", init)


@pytest.mark.parametrize("kind", ["conv_filter", "linear_neuron", "linear_input", "layer"])
def test_by_product_as_by_rows(kind: str, conv_net: nn.Module, elsewhere: None) -> None:
    index = ablate.ComponentIndex.from_model(conv_net, [kind])
    weights = WeightGates(conv_net, index)
    for row in ablate.KeepPlan(len(index), 5, 0.4).take(0, 5):
        keep = torch.from_numpy(row)
        weights.set_keep(keep)
        by_product = [p.clone() for p in conv_net.parameters()]
        weights.restore()
        with ablate.ablated(conv_net, index.select(torch.nonzero(~keep).flatten().tolist())):
            assert all(torch.equal(a, b) for a, b in zip(by_product, conv_net.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_weight_that_is_not_finite_becomes_zero_all_the_same(value: float, on_cpu: bool, mlp: nn.Module) -> None:
    with torch.no_grad():
        mlp.get_parameter("0.weight")[2, 1] = value
    index = ablate.ComponentIndex.from_model(mlp)
    weights = WeightGates(mlp, index)
    weights._on_cpu = on_cpu
    keep = torch.ones(len(index), dtype=torch.bool)
    keep[2] = False
    weights.set_keep(keep)
    assert torch.equal(mlp.get_parameter("0.weight")[2], torch.zeros(4))
    weights.restore()
    assert str(mlp.get_parameter("0.weight")[2, 1].item()) == str(value)


def test_rows_closed_before_are_open_again(mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    before = [p.clone() for p in mlp.parameters()]
    weights = WeightGates(mlp, index)
    weights.set_keep(torch.zeros(len(index), dtype=torch.bool))
    weights.set_gates(torch.full((len(index),), 0.5))
    weights.set_keep(torch.ones(len(index), dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(before, mlp.parameters(), strict=True))
