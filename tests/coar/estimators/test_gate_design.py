"""The gates of the gradient estimator: balanced, evenly spread, and a function of (seed, example, pass) alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ablate import KeepPlan
from coar.errors import FitError
from coar.estimators.gradient.design import BACKGROUNDS, GateDesign, Pass, check_design, gate_of

FRACTIONS = (0.01, 0.03, 0.05, 0.1, 0.25, 0.3, 0.4, 0.5)


def _passes(design: GateDesign, examples: range, count: int) -> list[Pass]:
    passes = design.passes(examples)
    return [passes.next() for _ in range(count)]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_round_samples_every_component_once(background: str, fraction: float) -> None:
    design = GateDesign(47, fraction, background, 3)
    for number in range(3):
        done = _passes(design, range(4), (number + 1) * design.groups)[number * design.groups :]
        sampled = np.stack([p.sampled for p in done])  # (passes of the round, examples, components)
        assert (sampled.sum(axis=0) == 1).all()
        if background == "bernoulli":
            assert (sampled.sum(axis=2) == 1).all(), "one at a time"
        assert all(p.even == (number % 2 == 0) for p in done)
        assert not any((p.closed & p.sampled).any() for p in done if p.closed is not None)


@pytest.mark.parametrize(
    ("background", "groups"),
    [
        ("continuous", (50, 17, 10, 5, 2, 2, 2, 2)),
        ("mixed", (100, 34, 20, 10, 4, 4, 3, 2)),
        ("bernoulli", (400,) * 8),
    ],
)
def test_passes_of_a_round(background: str, groups: tuple[int, ...]) -> None:
    assert tuple(GateDesign(400, fraction, background, 0).groups for fraction in FRACTIONS) == groups


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_mean_gate_is_what_is_asked_for(background: str, fraction: float) -> None:
    components, examples = 400, 8
    design = GateDesign(components, fraction, background, 1)
    count = max(100, 2 * design.groups) // design.groups * design.groups
    passes = design.passes(range(examples))
    mean = sum(passes.next().gates().mean() for _ in range(count)) / count
    expected = 1 - fraction
    if background == "bernoulli":  # the one in S is off by half, whatever the others are
        expected -= (0.5 - fraction) / components
    closed = design.closed_share
    spread = np.sqrt((closed * (1 - closed) + 1 / 12) / (components * examples * count))
    assert mean == pytest.approx(expected, abs=5 * spread + 0.3 / components / (count / design.groups))


@pytest.mark.parametrize("background", ["continuous", "mixed"])
@pytest.mark.parametrize("components", [1, 2, 8])
def test_the_mean_gate_of_few_components(background: str, components: int) -> None:
    gates = np.stack([p.gates() for p in _passes(GateDesign(components, 0.05, background, 1), range(200), 200)])
    assert gates.mean() == pytest.approx(0.95, abs=0.004)


def test_components_are_sampled_together_as_if_drawn_independently() -> None:
    """Two components, ten groups: both in S in one pass of a hundred; equal parts would never do it."""
    sampled = np.stack([p.sampled for p in _passes(GateDesign(2, 0.05, "continuous", 1), range(300), 200)])
    assert sampled.all(axis=2).mean() == pytest.approx(0.01, abs=0.0015)


def test_what_each_background_closes() -> None:
    assert [GateDesign(400, f, "continuous", 0).closed(range(2), 0) is None for f in FRACTIONS] == [
        True, False, True, True, True, False, False, False,
    ]  # fmt: skip
    gates = _passes(GateDesign(2000, 0.2, "mixed", 0), range(3), 1)[0].gates()
    assert (gates == 0).mean() == pytest.approx(0.1, abs=0.015), "half of the ablating is done by closed gates"
    gates = _passes(GateDesign(2000, 0.2, "bernoulli", 0), range(3), 1)[0].gates()
    assert (((gates != 0) & (gates != 1)).sum(axis=1) == 1).all(), "one gate in between per example"
    assert (gates == 0).mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_gates_depend_on_seed_example_and_pass_alone(background: str) -> None:
    design = GateDesign(30, 0.13, background, 9)
    together = [p.gates() for p in _passes(design, range(20), 40)]
    alone = [p.gates() for p in _passes(GateDesign(30, 0.13, background, 9), range(13, 14), 40)]
    for whole, one in zip(together, alone, strict=True):
        np.testing.assert_array_equal(whole[13:14], one)
    other = [p.gates() for p in _passes(GateDesign(30, 0.13, background, 10), range(13, 14), 40)]
    assert not any(np.array_equal(a, b) for a, b in zip(alone, other, strict=True))
    assert not np.array_equal(together[0][0], together[0][1])
    assert not np.array_equal(together[0], together[design.groups])


def _discrepancy(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the star discrepancy of each column's points."""
    ordered, n = np.sort(points, axis=0), len(points)
    above = np.arange(1, n + 1)[:, None] / n - ordered
    below = ordered - np.arange(n)[:, None] / n
    worst: npt.NDArray[np.float64] = np.maximum(above, below).max(axis=0)
    return worst


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20, 50])
def test_gates_of_a_component_are_spread_evenly(count: int) -> None:
    start = GateDesign(500, 0.05, "continuous", 2).start(range(2)).ravel()
    gates = np.stack([gate_of(start, number) for number in range(count)])
    drawn = np.random.default_rng(0).random(gates.shape)
    assert ((gates >= 0) & (gates < 1)).all()
    assert _discrepancy(gates).mean() < 0.9 * _discrepancy(drawn).mean()
    assert np.abs(gates.mean(axis=0) - 0.5).mean() < 0.85 * np.abs(drawn.mean(axis=0) - 0.5).mean()
    assert np.abs(np.sort(start) - np.linspace(0, 1, len(start))).max() < 0.06, "the first gate is uniform"


def test_passes_use_these_gates() -> None:
    design = GateDesign(20, 0.1, "continuous", 4)
    start = design.start(range(3))
    for number, one in enumerate(_passes(design, range(3), 15)):
        np.testing.assert_array_equal(one.u, gate_of(start, number // 5))
        np.testing.assert_array_equal(one.gates(), np.where(one.sampled, one.u, 1.0))


def test_drawing_is_independent_of_keep_plans() -> None:
    """An evaluation with the same seed must not ablate, in row i, what example i sampled together."""
    design, keep = GateDesign(50, 0.1, "continuous", 6), KeepPlan(50, 20, 0.2, 6).take(0, 20)
    ablated_together = [
        len(np.unique(group[~row])) for group, row in zip(design.group_of(range(20), 0), keep, strict=True)
    ]
    assert min(ablated_together) > 1
    below = np.mean(design.start(range(20))[~keep])
    assert below == pytest.approx(0.5, abs=0.1)
    closed = GateDesign(50, 0.2, "mixed", 6).closed(range(20), 0)
    assert closed is not None
    assert closed[~keep].mean() < 0.3


GOLDEN: dict[str, list[list[list[float]]]] = {
    "continuous": [
        [[1, 0.256906, 1, 1], [1, 1, 0.784752, 0]],
        [[1, 1, 0.399017, 0.337725], [0, 1, 1, 0.176788]],
        [[0.485923, 1, 1, 0], [0.677653, 0.232872, 1, 1]],
        [[1, 0.87494, 0, 0.955759], [1, 1, 0.402786, 1]],
    ],
    "mixed": [
        [[0.485923, 1, 1, 1], [1, 1, 1, 0]],
        [[1, 0.256906, 1, 1], [0, 1, 0.784752, 0.176788]],
        [[1, 1, 0.399017, 0.337725], [1, 0, 1, 1]],
        [[1, 1, 0, 0], [0.677653, 0.232872, 1, 1]],
    ],
    "bernoulli": [
        [[1, 0, 1, 0.337725], [1, 1, 1, 0.176788]],
        [[1, 1, 0.399017, 1], [0, 0.232872, 1, 1]],
        [[0.485923, 1, 1, 0], [1, 0, 0.784752, 1]],
        [[0, 0.256906, 0, 0], [0.677653, 1, 1, 1]],
    ],
}


def test_the_first_gates_never_change() -> None:
    for background, expected in GOLDEN.items():
        gates = np.stack([p.gates() for p in _passes(GateDesign(4, 0.2, background, 7), range(5, 7), 4)])
        np.testing.assert_allclose(gates, expected, atol=5e-7, err_msg=background)


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, float("nan")])
def test_fractions_without_a_design(fraction: float) -> None:
    with pytest.raises(FitError) as caught:
        check_design(fraction, "continuous")
    assert str(caught.value) == (
        f"ablate_fraction is {fraction}, expected a number above 0 and at most 0.5 for estimates from gradients. For "
        "more, run a campaign and fit it (coar.fit)."
    )


def test_an_unknown_background() -> None:
    with pytest.raises(FitError) as caught:
        check_design(0.1, "continous")
    assert str(caught.value) == "background is 'continous', expected one of continuous, mixed, bernoulli."
