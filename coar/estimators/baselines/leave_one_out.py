"""Leave-one-out: what an output loses without each component alone. Needs no gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ablate import Engine, Examples
from coar.estimators.abstract import BlockEstimate, Estimator
from coar.estimators.plain import plain_estimate, require_components


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """`weight_i = output(everything kept) - output(all but i)`: exact for one ablation, blind to interaction.

    Cost: a forward per component, without what comes before it in the model; counted as whole passes.
    Source: the leave-one-out baseline of COAR (arXiv 2404.11534), Section 4.
    """

    name = "leave_one_out"

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block of examples, nothing sampled. Mutates nothing."""
        require_components(engine)
        count = len(engine.index)
        full = engine.outputs(np.ones((1, count), dtype=np.bool_), examples)[0].double().numpy()
        without = engine.leave_one_out(examples).numpy()
        return plain_estimate(full[:, None] - without.T, full, passes=count + 1)

    def memory(self, components: int) -> int:
        """Returns bytes per example: outputs, their differences, weights and standard errors."""
        return 24 * components

    def work(self, components: int) -> float | None:
        """Returns the forwards of an example: one per component, and one."""
        return components + 1
