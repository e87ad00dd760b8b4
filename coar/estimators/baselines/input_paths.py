"""Baselines along a path of inputs: neuron conductance and internal influence, of components instead of neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ablate import Engine, Examples
from ablate.engine.activation_paths import conductance, influence
from coar.estimators.abstract import BlockEstimate, Estimator
from coar.estimators.plain import check_baseline, check_steps, gauss_legendre, plain_estimate, require_components


@dataclass(frozen=True)
class _AlongInputs(Estimator):
    """What methods along a path of inputs have in common."""

    needs_gradients: ClassVar[bool] = True
    steps: int = 20
    baseline: float = 0.0

    def __post_init__(self) -> None:
        check_steps(self.name, self.steps)
        check_baseline(self.name, self.baseline)

    def memory(self, components: int) -> int:
        """Returns bytes per example: numbers in two precisions, weights and standard errors."""
        return 40 * components


@dataclass(frozen=True)
class NeuronConductance(_AlongInputs):
    """How much of the output's change from a baseline input to the input flows through each component.

    The weights of one layer that everything passes through add up to output(input) - output(baseline), as `steps` grow.
    Numbers as Captum's `LayerConductance.attribute(method="riemann_trapezoid", n_steps=steps)`, summed over places.
    Kinds: all that can be gated per example. Inputs: floating.

    Args:
      steps: Intervals between the baseline and the input.
      baseline: Every value of the baseline input, as the model sees it (normalised).

    Cost: steps + 1 forwards, a backward for all but one of them, and one forward more.
    Source: Dhamdhere et al., "How important is a neuron?" (arXiv 1805.12233), Section 3.
    """

    name = "neuron_conductance"

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block of examples, nothing sampled. Mutates nothing."""
        require_components(engine)
        points = np.linspace(0, 1, self.steps + 1).tolist()
        weights = conductance(engine, examples, points=points, baseline=self.baseline).double().numpy()
        return plain_estimate(weights, _full(engine, examples), passes=self.steps + 2)


@dataclass(frozen=True)
class InternalInfluence(_AlongInputs):
    """The mean gradient of the output with respect to each component's activation, on the path from a baseline input.

    Per unit of activation: a ranking, not in units of the output, so predictions made of it are off in scale.
    Numbers as Captum's `InternalInfluence.attribute(n_steps=steps)`, summed over places. Kinds: all that can be
    gated per example. Inputs: floating.

    Args:
      steps: Points between the baseline and the input (Gauss-Legendre).
      baseline: Every value of the baseline input, as the model sees it (normalised).

    Cost: a forward and backward per step, and one forward.
    Source: Leino et al., "Influence-directed explanations" (arXiv 1802.03788), Section 3.
    """

    name = "internal_influence"

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block of examples, nothing sampled. Mutates nothing."""
        require_components(engine)
        points, shares = gauss_legendre(self.steps)
        weights = influence(engine, examples, points=points, shares=shares, baseline=self.baseline).double().numpy()
        return plain_estimate(weights, _full(engine, examples), passes=self.steps + 1)


def _full(engine: Engine, examples: Examples) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Returns the outputs with everything kept, (examples,)."""
    return engine.outputs(np.ones((1, len(engine.index)), dtype=np.bool_), examples)[0].double().numpy()
