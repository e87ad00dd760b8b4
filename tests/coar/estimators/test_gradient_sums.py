"""The sums that are kept of gate gradients, against a slow recomputation from the passes themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coar.estimators.gradient.design import BACKGROUNDS, GateDesign, Pass, gate_of
from coar.estimators.gradient.moments import BYTES, GradientSums, Moments

EXAMPLES, COMPONENTS = 3, 7


def _run(background: str, passes: int, dtype: torch.dtype) -> tuple[Moments, GradientSums, list[Pass], np.ndarray]:
    """Returns the moments, the sums, the passes and the gradients (passes, examples, components) in float64."""
    design = GateDesign(COMPONENTS, 0.2, background, 5)
    drawn, generator = design.passes(range(4, 4 + EXAMPLES)), np.random.default_rng(8)
    sums, done = GradientSums(EXAMPLES, COMPONENTS, dtype), []
    gradients = torch.from_numpy(generator.normal(1.5, 2.0, (passes, EXAMPLES, COMPONENTS))).to(dtype)
    for number in range(passes):
        done.append(drawn.next())
        sums.add(done[-1], torch.arange(EXAMPLES) * 10.0 + number, gradients[number])
    return Moments.of(sums, drawn.start), sums, done, gradients.double().numpy()


def _one(values: list[float], kept: list[float], gates: list[float], slopes: list[float]) -> dict[str, float]:
    """The moments of one example and component; values, gates: sampled, in order of rounds; kept: where it was kept."""
    even, odd = values[::2], values[1::2]
    off = [gate - 0.5 for gate in gates]
    return {
        "count": len(values),
        "even_count": len(even),
        "total": sum(values),
        "even_mean": sum(even) / max(1, len(even)),
        "odd_mean": sum(odd) / max(1, len(odd)),
        "squares": sum(v * v for v in values),
        "slanted": sum(v * o for v, o in zip(values, off, strict=True)),
        "u": sum(off),
        "u_squares": sum(o * o for o in off),
        "u_even": sum(off[::2]),
        "u_odd": sum(off[1::2]),
        "slope": float(np.mean(slopes)),
        "slope_variance": float(np.var(kept, ddof=1)) if len(kept) > 1 else 0.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("passes", [1, 2, 5, 14, 23])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_moments_equal_a_slow_recomputation(background: str, passes: int, dtype: torch.dtype) -> None:
    moments, _, done, gradients = _run(background, passes, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for example in range(EXAMPLES):
        for component in range(COMPONENTS):
            at = example, component
            sampled = [p.sampled[at] for p in done]
            kept = [gradients[i][at] for i, p in enumerate(done) if p.gates()[at] == 1.0]
            values = [gradients[i][at] for i, is_in in enumerate(sampled) if is_in]
            gates = [p.gates()[at] for p in done if p.sampled[at]]
            if not kept and not values:  # closed in every pass
                assert moments.slope[at] == 0
                continue
            expected = _one(values, kept, gates, kept or values)
            for name, value in expected.items():
                found = getattr(moments, name)[at]
                assert found == pytest.approx(value, rel=tolerance, abs=tolerance * 10), (name, at)


@pytest.mark.parametrize("passes", [1, 4, 15, 16])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_mean_gates_and_outputs(background: str, passes: int) -> None:
    moments, sums, done, _ = _run(background, passes, torch.float64)
    mean = np.mean([p.gates() for p in done], axis=0)
    np.testing.assert_allclose(moments.mean_gates(sums), mean, atol=1e-12)
    np.testing.assert_array_equal(sums.output.numpy(), [passes * (passes - 1) / 2 + 10 * e * passes for e in range(3)])
    assert sums.passes == passes


def test_partial_rounds() -> None:
    """With 3 groups, 4 passes sample the first group twice and the others once."""
    moments, _, done, _ = _run("continuous", 4, torch.float64)
    first = done[0].sampled | done[3].sampled
    assert set(np.unique(moments.count)) <= {1.0, 2.0}
    np.testing.assert_array_equal(moments.count == 2, done[3].sampled)
    assert (moments.odd_mean[moments.count == 1] == 0).all()
    assert first.any()
    moments, *_ = _run("continuous", 2, torch.float64)
    assert set(np.unique(moments.count)) == {0.0, 1.0}


def test_a_component_without_a_gradient_at_gate_1_has_the_sampled_mean_for_a_slope() -> None:
    sums = GradientSums(1, 1, torch.float64)
    start, always = np.full((1, 1), 0.25), np.ones((1, 1), dtype=np.bool_)
    for number, value in enumerate((2.0, 4.0)):
        one = Pass(always, None, gate_of(start, number), even=number % 2 == 0)
        sums.add(one, torch.zeros(1), torch.full((1, 1), value, dtype=torch.float64))
    moments = Moments.of(sums, start)
    assert (moments.slope[0, 0], moments.slope_variance[0, 0]) == (3.0, 0.0)


def test_bytes_are_those_of_the_tensors_in_float32() -> None:
    sums = GradientSums(50, 40, torch.float32)
    held = sum(t.nbytes for t in vars(sums).values() if isinstance(t, torch.Tensor) and t.ndim == 2)
    first_gates = 8 * 50 * 40
    assert (held + first_gates) / (50 * 40) == BYTES


def test_what_is_added_is_not_changed() -> None:
    gradients, outputs = torch.randn(2, 5), torch.randn(2)
    passes = GateDesign(5, 0.2, "mixed", 0).passes(range(2))
    before = gradients.clone(), outputs.clone()
    one = passes.next()
    gates = one.gates()
    GradientSums(2, 5, torch.float32).add(one, outputs, gradients)
    assert torch.equal(gradients, before[0])
    assert torch.equal(outputs, before[1])
    np.testing.assert_array_equal(one.gates(), gates)
