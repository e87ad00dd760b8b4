"""What a model does only where a batch is large, or only while autograd is on: found before a number is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ablate


class Only(nn.Module):
    """Two layers, and between them something that happens only in some forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.first(x)).relu())
        return logits

    def between(self, x: Tensor) -> Tensor:
        return x


class Reversed(Only):
    """Turns batches of more than four around, and back: an example's places hold another one's values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0)).flip(0) if len(x) > 4 else super().forward(x)


class Mixed(Only):
    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) > 2 else x


class Hooked(Only):
    def between(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / 2)  # type: ignore[no-untyped-call]
        return x


class ByMode(Only):
    def between(self, x: Tensor) -> Tensor:
        return 2 * x if torch.is_grad_enabled() else x


INPUTS = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9) % 3


def _engine(model: nn.Module, mode: str = "auto") -> ablate.Engine:
    return ablate.Engine(model.eval(), ablate.ComponentIndex.from_model(model, include=["first"]), mode=mode)


@pytest.fixture
def keep() -> Tensor:
    return torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.4


def test_an_order_of_large_batches_matters_to_gates_only(keep: Tensor) -> None:
    model = Reversed().eval()
    engine = _engine(model)
    right = ablate.reference_outputs(model, engine.index, keep.numpy(), INPUTS, LABELS)
    assert torch.allclose(engine.outputs(keep, INPUTS, LABELS), right, atol=1e-6)
    for call in (
        lambda: _engine(model, "activation").outputs(keep, INPUTS, LABELS),
        lambda: engine.gate_gradients(torch.ones(9, 6), INPUTS, LABELS),
        lambda: engine.example_outputs(torch.ones(9, 6), INPUTS, LABELS),
    ):
        with pytest.raises(ablate.GatingError, match="influence each other in a batch of"):
            call()
    few = ablate.Engine(model, engine.index, batch_size=2)  # at which it was checked
    assert few.example_outputs(torch.ones(9, 6), INPUTS, LABELS).shape == (9,)


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_examples_that_mix_in_large_batches_only(mode: str, keep: Tensor) -> None:
    model, plain = Mixed(), Only()
    plain.load_state_dict(model.state_dict())
    engine = _engine(model, mode)
    with pytest.raises(ablate.GatingError, match=r"influence each other in a batch of .*batch_size=2"):
        engine.outputs(keep, INPUTS, LABELS)
    two = ablate.Engine(model, engine.index, mode=mode, batch_size=2).outputs(keep, INPUTS[:2], LABELS[:2])
    assert torch.allclose(two, _engine(plain).outputs(keep, INPUTS[:2], LABELS[:2]), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "cause"), [(Hooked(), "a hook on a tensor"), (ByMode(), "something else while autograd is on")]
)
def test_gradients_of_another_function_are_refused(model: nn.Module, cause: str, keep: Tensor) -> None:
    engine = _engine(model)
    right = ablate.reference_outputs(model, engine.index, keep.numpy(), INPUTS, LABELS)
    assert torch.allclose(engine.outputs(keep, INPUTS, LABELS), right, atol=1e-6)
    with pytest.raises(ablate.NoGradientError, match=f"'first'.*{cause}"):
        engine.gate_gradients(torch.ones(9, 6), INPUTS, LABELS)
