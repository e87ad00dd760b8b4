"""Networks that work in place, remove padding, pack, route, sort and cut gradients: the same numbers, or a name.

Every way of running a drawn network equals zeroing its weights by hand, or is refused by the name of a module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import ablate

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of checkpoints
WIDTH, LENGTH, CLASSES = 4, 6, 3
NAMED = re.compile(r"(Module|components of|module) '")


class InPlace(nn.Linear):
    """Goes on with its own output in place, in one of several ways; `saved` is read by the network."""

    def __init__(self, how: str) -> None:
        super().__init__(WIDTH, WIDTH)
        self.how = how
        self.adapter = nn.Linear(WIDTH, WIDTH, bias=False) if how == "adapter" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.how == "relu":
            return F.relu_(y)
        if self.how == "adapter":
            y += self.adapter(x)
        if self.how == "dropout":
            return F.dropout(y, 0.5, training=self.training, inplace=True)
        if self.how == "scaled through .data":
            y.data.mul_(2)
        if self.how == "slice":
            y[..., :2].tanh_()
        if self.how == "input":
            x.mul_(0.5)
        self.saved = y
        return y


class Tanh(torch.autograd.Function):
    """A custom function, with the right derivative or another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, right: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.right = right
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (slope * (1 - torch.tanh(x) ** 2) if ctx.right else slope), None


def _without_autograd(x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.tanh(x)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": Tensor.detach,
    "partly detached": lambda x: x + torch.tanh(x).detach(),
    "no_grad": _without_autograd,
    "rounded": lambda x: torch.round(4 * x),
    "function": lambda x: Tanh.apply(x, True),
    "another derivative": lambda x: Tanh.apply(x, False),
    "through Python": lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
    "dead": lambda x: torch.relu(x - 100),
}
WAYS_IN_PLACE = ("relu", "adapter", "dropout", "scaled through .data", "slice", "input", "read elsewhere")
LAYOUTS = ("batch first", "time-major", "flat", "flat, in turn", "windows", "chunks of two")
RAGGED = (
    *("unpadded", "packed", "sorted by length", "experts", "experts by a product", "one by one", "by a number"),
    *("tokens that count", "first real token"),
)
RUNS = ("plain", "checkpoint", "reentrant checkpoint")


@dataclass(frozen=True)
class Step:
    """One drawn step over (B, T, C) tokens: what it does, and how."""

    what: str
    how: str


class Drawn(nn.Module):
    """Steps in a row, then the mean of the tokens, then classes."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList(_part(step) for step in steps)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        real = x.abs().sum(dim=2) > 0
        h = x.clone()
        for step, part in zip(self.steps, self.parts, strict=True):
            h = h + RUN[step.what](part, step.how, torch.tanh(h), real)
        h = torch.where(real[..., None], h, 0)
        logits: Tensor = self.head(h.sum(dim=1) / LENGTH)
        return logits


def _part(step: Step) -> nn.Module:
    if step.what == "in place":
        return InPlace(step.how)
    if step.how == "packed":
        return nn.LSTM(WIDTH, WIDTH, batch_first=True)
    return nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])


def _in_place(part: Any, how: str, h: Tensor, real: Tensor) -> Tensor:
    y: Tensor = part(h)
    return y + part.saved if how == "read elsewhere" else y


def _two(part: Any, h: Tensor) -> Tensor:
    y: Tensor = part[1](torch.relu(part[0](h)))
    return y


def _laid_out(part: Any, how: str, h: Tensor, real: Tensor) -> Tensor:
    count = len(h)
    if how == "time-major":
        return _two(part, h.transpose(0, 1)).transpose(0, 1)
    if how == "flat":
        return _two(part, h.reshape(-1, WIDTH)).view(h.shape)
    if how == "flat, in turn":
        return _two(part, h.transpose(0, 1).reshape(-1, WIDTH)).view(LENGTH, count, WIDTH).transpose(0, 1)
    if how == "windows":
        return _two(part, h.reshape(count * 3, 2, WIDTH)).view(h.shape)
    if how == "chunks of two":
        return torch.cat([_two(part, some) for some in h.split(2)])  # type: ignore[no-untyped-call]  # torch
    return _two(part, h)


def _ragged(part: Any, how: str, h: Tensor, real: Tensor) -> Tensor:
    result = torch.zeros_like(h)
    lengths = real.sum(dim=1)
    if how == "unpadded":
        result[real] = _two(part, h[real])
    elif how == "packed":
        packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        result = pad_packed_sequence(part(packed)[0], batch_first=True, total_length=LENGTH)[0]
    elif how == "sorted by length":
        order = torch.argsort(lengths, stable=True)
        result[order] = _two(part, h[order])
    elif how == "experts":
        flat = h.reshape(-1, WIDTH)
        chosen, out = flat[:, 0] > flat[:, 1], torch.zeros_like(flat)
        for expert, mine in enumerate((chosen, ~chosen)):
            out = out.index_put((mine.nonzero()[:, 0],), part[expert](flat[mine]))
        result = out.view(h.shape)
    elif how == "experts by a product":
        flat = h.reshape(-1, WIDTH)
        chosen = (flat[:, 0] > flat[:, 1]).to(h.dtype)
        place = (torch.cumsum(chosen, 0) - 1)[:, None] == torch.arange(len(flat))
        send = place.to(h.dtype) * chosen[:, None]  # (tokens, places)
        result = (send @ _two(part, send.T @ flat)).view(h.shape)
    elif how == "one by one":
        result = torch.cat([_two(part, one[None]) for one in h])
    elif how == "by a number":
        result = _two(part, h) if bool((h[:, 0, 0] > 0).all()) else _two(part, h.flip(0)).flip(0)
    elif how == "tokens that count":
        score = h.sum(dim=2).topk(3, dim=1).indices[..., None].expand(-1, -1, WIDTH)
        result = result.scatter(1, score, _two(part, h.gather(1, score)))
    else:
        first = h[torch.arange(len(h)), real.int().argmax(dim=1)]
        result = result + _two(part, first)[:, None]
    return result


def _cut(part: Any, how: str, h: Tensor, real: Tensor) -> Tensor:
    y: Tensor = part[1](CUTS[how](part[0](h)))
    return y


def _run(part: Any, how: str, h: Tensor, real: Tensor) -> Tensor:
    if how == "plain":
        return _two(part, h)
    y: Tensor = checkpoint(partial(_two, part), h, use_reentrant=how == "reentrant checkpoint")
    return y


RUN: dict[str, Callable[[Any, str, Tensor, Tensor], Tensor]] = {
    "in place": _in_place,
    "laid out": _laid_out,
    "ragged": _ragged,
    "cut": _cut,
    "run": _run,
}
steps = st.one_of(
    st.builds(Step, st.just("in place"), st.sampled_from(WAYS_IN_PLACE)),
    st.builds(Step, st.just("laid out"), st.sampled_from(LAYOUTS)),
    st.builds(Step, st.just("ragged"), st.sampled_from(RAGGED)),
    st.builds(Step, st.just("cut"), st.sampled_from(sorted(CUTS))),
    st.builds(Step, st.just("run"), st.sampled_from(RUNS)),
)
STEPS = (
    *(Step("in place", how) for how in WAYS_IN_PLACE),
    *(Step("laid out", how) for how in LAYOUTS),
    *(Step("ragged", how) for how in RAGGED),
    *(Step("cut", how) for how in CUTS),
    *(Step("run", how) for how in RUNS),
)


def _batch(examples: int, seed: int, ragged: bool) -> Tensor:
    generator = np.random.default_rng(seed)
    inputs = torch.tensor(generator.standard_normal((examples, LENGTH, WIDTH)))
    for example in range(2 if generator.random() < 0.5 else 0, examples):  # the first two are often whole
        if ragged:
            inputs[example, generator.integers(1, LENGTH + 1) :] = 0
    return inputs


def _or_named(run: Callable[[], Any]) -> Any:
    """Returns what was computed, None if it was refused by the name of a module."""
    try:
        return run()
    except ablate.GatingError as error:
        refusal = error
    assert NAMED.search(str(refusal)), refusal
    return None


def _check(design: tuple[Step, ...], examples: int, batch_size: int, seed: int, ragged: bool) -> set[str]:
    """Checks one network and batch; returns which ways of running it were refused."""
    torch.manual_seed(seed)
    model = Drawn(design).double().eval()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    generator = np.random.default_rng(seed)
    keep = generator.random((examples, len(index))) >= 0.4
    data = _batch(examples, seed, ragged), torch.tensor(generator.integers(0, CLASSES, examples))
    expected = ablate.reference_outputs(model, index, keep, *data)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
    options: dict[str, Any] = {"precision": "float64", "batch_size": batch_size}
    weights = ablate.Engine(model, index, **options)
    torch.testing.assert_close(weights.outputs(keep, *data), expected, **close)

    refused = set[str]()
    by_gates = _or_named(lambda: ablate.Engine(model, index, mode="activation", **options).outputs(keep, *data))
    each = _or_named(lambda: weights.example_outputs(keep.astype(float), *data))
    if by_gates is None or each is None:
        refused.add("activation gating")
    else:
        torch.testing.assert_close(by_gates, expected, **close)
        torch.testing.assert_close(each, expected.diagonal(), **close)
    gates = torch.tensor(generator.uniform(0.3, 1.5, (examples, len(index))))
    found = _or_named(lambda: weights.gate_gradients(gates, *data))
    if found is None:
        return refused | {"gradients"}
    along = torch.tensor(generator.standard_normal(gates.shape))
    up, down = (weights.gated_outputs(gates + sign * 1e-6 * along, *data).diagonal() for sign in (1, -1))
    slope = (found[1] * along).sum(dim=1)
    torch.testing.assert_close((up - down) / 2e-6, slope, rtol=1e-4, atol=1e-5)
    return refused


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.what}: {step.how}")
def test_a_step_of_each_kind(step: Step) -> None:
    """With the batches that tell: whole ones first, ragged ones later, a total that the number of examples divides."""
    allowed = {"gradients"} if step.what in ("cut", "run") or ".data" in step.how else set()
    allowed |= {"activation gating", "gradients"} if step.how in ("packed", "chunks of two") else set()
    for seed in range(3):
        assert _check((step,), 4, 8, seed, ragged=True) <= allowed


REFUSED_GRADIENTS = ("detached", "partly detached", "no_grad", "rounded", "another derivative", "through Python")


@pytest.mark.parametrize("how", CUTS)
def test_gradients_that_are_cut_are_refused_and_no_others(how: str) -> None:
    refused = _check((Step("cut", how),), 3, 8, 0, ragged=False)
    assert refused == ({"gradients"} if how in REFUSED_GRADIENTS else set())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(steps, min_size=1, max_size=3).map(tuple),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_equal_to_zeroing_by_hand_or_refused_by_name(
    design: tuple[Step, ...], examples: int, batch_size: int, seed: int, ragged: bool
) -> None:
    _check(design, examples, batch_size, seed, ragged)
