"""Baselines from gradients with respect to gates: at the unablated model, and along the path from all closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ablate import Engine, Examples
from coar.estimators.abstract import BlockEstimate, Estimator
from coar.estimators.plain import check_steps, gauss_legendre, plain_estimate, require_components


@dataclass(frozen=True)
class GradientTimesGate(Estimator):
    """`weight_i = d output / d gate_i` with all gates open: the slope of ablating a little, taken for the whole.

    The same as gradient x parameter, summed over the parameters of the component. Cost: one forward and backward.
    Source: the gradient-times-parameter baseline of COAR (arXiv 2404.11534), Section 4.
    """

    name = "gradient_times_gate"
    needs_gradients: ClassVar[bool] = True

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block of examples, nothing sampled. Mutates nothing."""
        require_components(engine)
        ones = np.ones((len(examples), len(engine.index)), dtype=np.float32)
        full, slopes = engine.gate_gradients(ones, examples)
        return plain_estimate((1 - engine.ablation.closed) * slopes.double().numpy(), full.double().numpy(), passes=1)

    def memory(self, components: int) -> int:
        """Returns bytes per example: gates, gradients in two precisions, weights and standard errors."""
        return 40 * components


@dataclass(frozen=True)
class IntegratedGateGradients(Estimator):
    """The mean gate gradient on the straight line from all gates closed to all open (Gauss-Legendre).

    Complete: the weights of an example add up to output(all kept) - output(all ablated), as `steps` grow.

    Args:
      steps: Points on the line.

    Cost: a forward and backward per step, and one forward.
    Source: integrated gradients (Sundararajan et al., arXiv 1703.01365, Section 3), with gates for inputs.
    """

    name = "integrated_gate_gradients"
    needs_gradients: ClassVar[bool] = True
    steps: int = 20

    def __post_init__(self) -> None:
        check_steps(self.name, self.steps)

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block of examples, nothing sampled. Mutates nothing."""
        require_components(engine)
        shape = len(examples), len(engine.index)
        closed = engine.ablation.closed
        total = np.zeros(shape)
        for point, share in zip(*gauss_legendre(self.steps), strict=True):
            gates = np.full(shape, closed + point * (1 - closed), dtype=np.float64)
            total += share * engine.gate_gradients(gates, examples)[1].numpy()
        full = engine.outputs(np.ones((1, shape[1]), dtype=np.bool_), examples)[0].double().numpy()
        return plain_estimate((1 - closed) * total, full, passes=self.steps + 1)

    def memory(self, components: int) -> int:
        """Returns bytes per example: gates, gradients, their sum, weights and standard errors."""
        return 48 * components
