"""Law 9, drawn at random: outputs equal literal zeroing on the user's live model, or the model is refused by name."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ablate

INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(5) % 3
SIZE = 4
REFUSED = (
    "A copy of this Drawn ",
    "The weights ",
    "The examples of a batch influence each other: ",
    "Module ",  # that cannot be gated per example
)


class Reaches(nn.Module):
    """Finds a layer of another module by a reference."""

    def __init__(self, reference: Callable[[], Drawn | None], name: str) -> None:
        super().__init__()
        self.reference, self.name = reference, name

    def forward(self, x: Tensor) -> Tensor:
        owner = self.reference()
        assert owner is not None
        y: Tensor = getattr(owner, self.name)(x)
        return y


class Drawn(nn.Module):
    """Three layers, each called as drawn, and a mask on the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 5)
        self.steps: list[Callable[[Tensor], Tensor]] = [self.a, self.b]
        self.mask, self.mixes = 0.0, False

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.relu(step(x))
        x = x - 0.5 * x.mean(dim=0) if self.mixes else x
        logits: Tensor = self.c(x)
        return logits.masked_fill(torch.tensor([False, False, False, True, True]), self.mask) if self.mask else logits


def _by_hook(model: Drawn, name: str) -> Callable[[Tensor], Tensor]:
    layer = getattr(model, name)
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        kept["output"] = layer.weight.sum() * 0 + output

    layer.register_forward_hook(keep)

    def call(x: Tensor) -> Tensor:
        layer(x)
        return kept["output"]

    return call


def _patched(model: Drawn, name: str) -> Callable[[Tensor], Tensor]:
    layer = getattr(model, name)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 1.0
    return layer  # type: ignore[no-any-return]


def _with_default(given: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor, layer: nn.Module = given) -> Tensor:
        y: Tensor = layer(x)
        return y

    return call


CALLS: dict[str, Callable[[Drawn, str], Callable[[Tensor], Tensor]]] = {
    "as a module": lambda model, name: getattr(model, name),
    "by a method": lambda model, name: getattr(model, name).forward,
    "by a partial function": lambda model, name: functools.partial(nn.Module.__call__, getattr(model, name)),
    "by a closure": lambda model, name: lambda x: getattr(model, name)(x),
    "by a default": lambda model, name: _with_default(getattr(model, name)),
    "by its weight in a closure": lambda model, name: (lambda weight: lambda x: x @ weight.T)(
        getattr(model, name).weight.data
    ),
    "by a weak reference": lambda model, name: Reaches(weakref.ref(model), name),
    "by another forward": _patched,
    "by a hook": _by_hook,
}
SHARED: dict[str, Callable[[Drawn], None]] = {
    "nothing": lambda model: None,
    "one parameter": lambda model: setattr(model.b, "weight", model.a.weight),
    "memory": lambda model: setattr(model.b.weight, "data", model.a.weight.data),
    "memory, transposed": lambda model: setattr(model.b.weight, "data", model.a.weight.data.T),
    "memory, a bias of it": lambda model: setattr(model.b.bias, "data", model.a.weight.data[1]),
    "memory, a part": lambda model: setattr(model.c.bias, "data", model.a.weight.data.flatten()[2:7]),
    "memory of one block": lambda model: _in_one_block(model),
}


FOLLOWED = {"as a module", "by a method", "by a partial function"}
APART = ("nothing", "one parameter", "memory", "memory of one block")


def _in_one_block(model: Drawn) -> None:
    """Lays weights side by side, as a flattened optimizer does; nothing is on top of another."""
    block = torch.cat([model.a.weight.data, model.b.weight.data])
    model.a.weight.data, model.b.weight.data = block[:SIZE], block[SIZE:]


def _by_hand(model: Drawn, index: ablate.ComponentIndex, keep: npt.NDArray[np.bool_]) -> Tensor:
    """Returns the margins of the live model with slices of its weights zeroed in place, and put back."""
    parameters = dict(model.named_parameters())
    rows = []
    for row in keep:
        with torch.no_grad():
            before = {name: parameter.clone() for name, parameter in parameters.items()}
            for c in (index[int(i)] for i in np.flatnonzero(~row)):
                parameters[c.parameter].narrow(c.axis, c.start, c.stop - c.start).zero_()
            logits = model(INPUTS)
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        rows.append(ablate.Margin()(logits, TARGETS))
    return torch.stack(rows)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    calls=st.tuples(*[st.sampled_from(list(CALLS))] * 2),
    shared=st.sampled_from(list(SHARED)),
    mask=st.sampled_from([0.0, float("-inf"), -1e9, torch.finfo(torch.float32).min]),
    mixes=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_copy_follows_or_is_refused(calls: tuple[str, str], shared: str, mask: float, mixes: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn().eval()
    SHARED[shared](model)
    model.steps = [CALLS[call](model, name) for call, name in zip(calls, "ab", strict=True)]
    model.mask, model.mixes = mask, mixes
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], exclude=["c"])
    keep = ablate.KeepPlan(len(index), 4, 0.4, seed=seed).take(0, 4)
    expected = _by_hand(model, index, keep)
    follows = set(calls) <= FOLLOWED and shared in APART
    for mode in ("weight", "activation"):
        outputs, refusal = _outcome(model, index, keep, mode)
        if outputs is None:
            assert refusal.startswith(REFUSED), refusal
            assert mixes or not follows or mode == "activation", f"refused without a reason: {refusal}"
        else:
            assert not mixes, "examples that are mixed were not noticed"
            torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def _outcome(
    model: Drawn, index: ablate.ComponentIndex, keep: npt.NDArray[np.bool_], mode: str
) -> tuple[Tensor | None, str]:
    try:
        return ablate.Engine(model, index, mode=mode).outputs(keep, INPUTS, TARGETS), ""
    except ablate.errors.GatingError as error:
        return None, str(error)
