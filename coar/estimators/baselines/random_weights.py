"""Random attributions: the floor of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ablate import Engine, Examples
from coar.errors import FitError
from coar.estimators.abstract import BlockEstimate, Estimator
from coar.estimators.plain import plain_estimate, require_components


@dataclass(frozen=True)
class RandomAttribution(Estimator):
    """Standard normal weights that know nothing of the model, drawn by (seed, position of the example).

    Cost: one forward, for the bias.
    """

    name = "random"

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns random attributions of a block of examples. Mutates nothing."""
        require_components(engine)
        if not 0 <= seed < 2**63:
            raise FitError(f"seed is {seed}, expected an integer from 0 to 2**63 - 1.")
        count = len(engine.index)
        weights = np.stack([_normal(seed, first + i, count) for i in range(len(examples))])
        full = engine.outputs(np.ones((1, count), dtype=np.bool_), examples)[0].double().numpy()
        return plain_estimate(weights, full, passes=1)

    def memory(self, components: int) -> int:
        """Returns bytes per example: numbers drawn, weights and standard errors."""
        return 24 * components


def _normal(seed: int, position: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns standard normal numbers (Box-Muller) of raw words: the same in any version of numpy."""
    words = np.random.Philox(key=np.array([seed, position], dtype=np.uint64)).random_raw(2 * count)
    radius, angle = ((words >> np.uint64(11)).astype(np.float64) + 0.5).reshape(2, count) / 2**53
    normal: np.ndarray[tuple[int], np.dtype[np.float64]] = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return normal
