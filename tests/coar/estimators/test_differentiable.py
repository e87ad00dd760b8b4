"""A model or output without gradients is named, with a way out; dead components and saturated ones are fine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from coar.errors import FitError
from coar.estimators.differentiable import ADVICE, check_differentiable
from coar.estimators.registry import estimator_names, get_estimator


class Detaching(nn.Module):
    """Two layers and a head; `between` stands behind the second layer, `after` behind the head."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.between(self.second(torch.tanh(self.first(x))))))


class Correct(ablate.Output):
    """1 where the prediction is correct."""

    name = "correct"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == targets).float()


def _without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def _through_python(x: Tensor) -> Tensor:
    return torch.tensor(x.detach().tolist(), dtype=x.dtype)


EXAMPLES = ablate.Examples(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), [0, 1, 2, 0, 1, 2])


def _engine(model: nn.Module, output: str | ablate.Output = "margin") -> ablate.Engine:
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    return ablate.Engine(model, index, output, self_check=False)


def _message(engine: ablate.Engine) -> str:
    with pytest.raises(FitError) as caught:
        check_differentiable(engine, EXAMPLES)
    return str(caught.value)


NOTHING = (
    "Gradients say nothing here: no component has a gradient, although ablating changes the output {!r}. Either the "
    "output is not differentiable (an argmax, a rounding, a count), or the model detaches after the last component "
    "(torch.no_grad, .detach(), .item(), numpy). " + ADVICE
)


def test_the_advice_is_regression() -> None:
    assert ADVICE == (
        "Estimate by regression, which needs outputs only: run a campaign (ablate.run) and coar.fit it. Or use "
        "method='leave_one_out'."
    )


def test_an_output_that_is_not_differentiable() -> None:
    assert _message(_engine(Detaching(), Correct())) == NOTHING.format("correct")


@pytest.mark.parametrize("cut", [Tensor.detach, _without_gradients, _through_python, torch.round])
def test_a_model_that_detaches_at_its_end(cut: Callable[[Tensor], Tensor]) -> None:
    assert _message(_engine(Detaching(after=lambda x: cut(4 * x)))) == NOTHING.format("margin")


@pytest.mark.parametrize("cut", [Tensor.detach, _without_gradients, _through_python, torch.round])
def test_a_model_that_detaches_in_the_middle(cut: Callable[[Tensor], Tensor]) -> None:
    assert _message(_engine(Detaching(between=lambda x: cut(4 * x)))) == (
        "Gradients say nothing here: no gradient reaches the components of 'first', 'second', although ablating them "
        "changes the output 'margin'. The model detaches after 'second' (torch.no_grad, .detach(), .item(), numpy, a "
        "rounding). " + ADVICE
    )


def test_a_model_that_fails_when_gradients_are_asked_for() -> None:
    model = Detaching(between=lambda x: torch.from_numpy(x.numpy().copy()))
    assert _message(_engine(model)) == (
        "This model fails when gradients are asked for: RuntimeError: Can't call numpy() on Tensor that requires grad. "
        "Use tensor.detach().numpy() instead. " + ADVICE
    )


@pytest.mark.parametrize("method", [m for m in estimator_names() if get_estimator(m).needs_gradients])
def test_no_method_that_needs_gradients_goes_on_without(method: str, tmp_path: Path) -> None:
    kinds = {"kinds": ["linear_neuron"]}
    with pytest.raises(FitError, match=r"^Gradients say nothing here: no component has a gradient"):
        coar.estimate(Detaching(), EXAMPLES, method=method, output=Correct(), components=kinds, store=tmp_path / "s")
    assert not (tmp_path / "s").exists(), "nothing is left behind"


def test_methods_without_gradients_go_on() -> None:
    found = get_estimator("leave_one_out").estimate(_engine(Detaching(), Correct()), EXAMPLES, 0, 0)
    assert set(found.weights.ravel().tolist()) <= {-1.0, 0.0, 1.0}
    assert found.weights.any()


def test_components_that_reach_no_output_are_fine() -> None:
    model = Detaching(between=lambda x: 0 * x + 1)
    check_differentiable(_engine(model), EXAMPLES)
    found = get_estimator("gradient_times_gate").estimate(_engine(model), EXAMPLES, 0, 0)
    assert not found.weights[:, :8].any()
    assert found.weights[:, 8:].any()


def test_saturation_is_no_fault() -> None:
    """At the open gates the slope is exactly zero; half-way it is not."""

    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(3, 2, bias=False)
            self.head = nn.Linear(2, 3)
            with torch.no_grad():
                self.hidden.weight.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.hidden(x.abs() + 1).clamp(max=1.0))
            return logits

    engine = _engine(Saturated())
    assert not get_estimator("gradient_times_gate").estimate(engine, EXAMPLES, 0, 0).weights[:, :2].any()
    check_differentiable(engine, EXAMPLES)


def test_a_gradient_that_is_not_finite_names_example_and_component() -> None:
    class Root(ablate.Output):
        name = "root"

        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            return torch.sqrt(logits[:, 0])

    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    examples = ablate.Examples(torch.tensor([[4.0], [0.0]]), [0, 0], ids=["good", "bad"])
    for method in ("gradient_times_gate", "integrated_gate_gradients"):
        with pytest.raises(ablate.NonFiniteOutputError) as caught:
            get_estimator(method).estimate(ablate.Engine(model, index, Root()), examples, 0, 0)
        assert str(caught.value).startswith("The gradient of component 0 on example 1 (id 'bad') is nan, expected a ")
