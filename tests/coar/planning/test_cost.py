"""Cost is arithmetic on a clock: checked with one that the tests turn by hand, never with time itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ablate
import coar
from ablate import ComponentIndex, Engine, Examples
from coar.planning.meter import run_plain


class HandTurnedClock:
    """A clock that stands still between `pass_by` calls."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def engine(tiny_net: nn.Module) -> Engine:
    return Engine(tiny_net, ComponentIndex.from_model(tiny_net), batch_size=4)


@pytest.fixture
def clock() -> HandTurnedClock:
    return HandTurnedClock()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, clock: HandTurnedClock) -> list[float]:
    """How long the coming plain passes take, in seconds, in order; the last goes on for ever."""
    durations = [100.0]  # the first is the warm-up at construction, which does not count

    def run(_: Any) -> None:
        clock.pass_by(durations.pop(0) if len(durations) > 1 else durations[0])

    monkeypatch.setattr(coar.CostMeter, "_pass", run)
    return durations


def test_cost_is_in_plain_passes_of_the_same_moment(
    engine: Engine, tiny_examples: Examples, clock: HandTurnedClock, passes: list[float]
) -> None:
    """Before: 1, 9, 2 s, median 2; after, on a slower machine: 4 s. One plain pass is 3 s, so 12 s are 4 of them."""
    passes += [1.0, 9.0, 2.0, 4.0]
    meter = coar.CostMeter(engine, tiny_examples, clock=clock)
    with meter.measure() as cost:
        assert np.isnan([cost.seconds, cost.plain_seconds, cost.forwards]).all()
        clock.pass_by(12.0)
    assert (cost.seconds, cost.plain_seconds, cost.forwards) == (12.0, 3.0, 4.0)


def test_short_passes_are_repeated_until_they_are_long_enough(
    engine: Engine, tiny_examples: Examples, clock: HandTurnedClock, passes: list[float]
) -> None:
    passes += [0.25]
    meter = coar.CostMeter(engine, tiny_examples, least_seconds=2.0, clock=clock)
    start = clock.now
    with meter.measure() as cost:
        assert clock.now - start == 2.0  # eight passes
    assert clock.now - start == 4.0
    assert (cost.seconds, cost.forwards) == (0.0, 0.0)


def test_each_piece_has_plain_passes_of_its_own(
    engine: Engine, tiny_examples: Examples, clock: HandTurnedClock, passes: list[float]
) -> None:
    passes += [1.0] * 6 + [5.0]
    meter = coar.CostMeter(engine, tiny_examples, clock=clock)
    found = []
    for seconds in (10.0, 50.0):
        with meter.measure() as cost:
            clock.pass_by(seconds)
        found.append((cost.seconds, cost.plain_seconds, cost.forwards))
    assert found == [(10.0, 1.0, 10.0), (50.0, 5.0, 10.0)]


def test_what_fails_has_no_cost(
    engine: Engine, tiny_examples: Examples, clock: HandTurnedClock, passes: list[float]
) -> None:
    passes += [1.0]
    meter = coar.CostMeter(engine, tiny_examples, clock=clock)
    with pytest.raises(KeyError), meter.measure() as cost:
        raise KeyError
    assert np.isnan([cost.seconds, cost.plain_seconds, cost.forwards]).all()


def test_a_plain_pass_is_the_models_forward(
    engine: Engine, tiny_examples: Examples, tiny_net: nn.Module, untouched: Any
) -> None:
    with untouched(tiny_net):
        found: list[torch.Tensor] = []
        run_plain(engine, tiny_examples, found.append)
    assert [len(logits) for logits in found] == [4, 4, 1]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found), tiny_net(tiny_examples.inputs()), atol=1e-5, rtol=1e-5)


def test_measuring_changes_no_output(
    engine: Engine, tiny_examples: Examples, tiny_net: nn.Module, untouched: Any
) -> None:
    keep = ablate.KeepPlan(10, 3, 0.3).take(0, 3)
    before = engine.outputs(keep, tiny_examples)
    with untouched(tiny_net):
        meter = coar.CostMeter(engine, tiny_examples, least_seconds=0.0)
        with meter.measure() as cost:
            inside = engine.outputs(keep, tiny_examples)
    assert cost.seconds > 0
    assert cost.forwards > 0
    for after in (inside, engine.outputs(keep, tiny_examples)):
        np.testing.assert_array_equal(after, before)


def test_repr_and_refusal(engine: Engine, tiny_examples: Examples) -> None:
    meter = coar.CostMeter(engine, tiny_examples, least_seconds=0)
    assert repr(meter) == f"<CostMeter: in plain forwards of 9 examples, {engine!r}>"
    with pytest.raises(coar.QueryError) as refused:
        coar.CostMeter(engine, tiny_examples, least_seconds=float("nan"))
    assert str(refused.value) == "least_seconds is nan, expected a number of seconds >= 0."


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_clock_is_read_when_the_device_is_done(
    tiny_net: nn.Module, tiny_examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Any] = []
    engine = Engine(tiny_net, ComponentIndex.from_model(tiny_net), device="cuda")
    meter = coar.CostMeter(engine, tiny_examples, least_seconds=0, clock=lambda: float(len(waited)))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with meter.measure() as cost:
        pass
    assert cost.plain_seconds == 1.0  # one wait between two looks at the clock
