"""The gradient estimator: attributions from some hundred backward passes, whatever the number of components.

For gates g in [0, 1], `output(g_i = 1) - output(g_i = 0)` is the integral of the gradient with respect to g_i, so that
the mean gradient at uniform gates is the effect of keeping component i, and one backward pass samples it for many
components of every example at once.
Source: the effect is that of COAR (arXiv 2404.11534, Section 3); sampling it along gates is Owen's multilinear
extension (Management Science 18, 1972), as integrated gradients are (arXiv 1703.01365).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ablate import Engine, Examples, KeepPlan
from ablate.engine.ticks import BACKWARD
from coar.errors import FitError
from coar.estimators.abstract import BlockEstimate, Estimator
from coar.estimators.gradient.design import GateDesign, check_design
from coar.estimators.gradient.moments import BYTES, GradientSums, Moments
from coar.estimators.gradient.refine import refine
from coar.estimators.gradient.shrinkage import MOST_SHARED, Posterior, shrink
from coar.estimators.plain import require_components

CONTINUOUS_UP_TO = 0.1
FIRST_LOOK = 8  # passes after which "auto" looks for the first time; then after every half as many again
FORWARD_SEED = 0x0F0A4D  # so that forward rows are never those of a campaign or an evaluation with the same seed


@dataclass(frozen=True)
class Gradient(Estimator):
    """Effects of components from gate gradients at random gates, with empirical Bayes over examples and components.

    Args:
      passes: Forward and backward passes per example; "auto": until the estimated error of predictions is below
        `tolerance`, at most `most_passes`.
      ablate_fraction: Share of components that is off on average, at most 0.5; what the attribution is about.
      background: "continuous", "mixed" or "bernoulli" (exact, for small networks): see `GateDesign`. None: "continuous"
        for ablate fractions up to 0.1, "mixed" above, where the first would be off by more than it saves.
      tolerance: For "auto": the share of the variance of predicted outputs that may be estimation error.
      most_passes: For "auto".
      forward_rows: Also run so many random keep-vectors forward and use them to refine the estimate; 0: none.

    Cost: `passes` forwards and backwards (about 2 to 3 plain forwards each), and `forward_rows` forwards, per example.
    """

    name: ClassVar[str] = "gradient"
    needs_gradients: ClassVar[bool] = True

    passes: int | str = 100
    ablate_fraction: float = 0.05
    background: str | None = None
    tolerance: float = 0.02
    most_passes: int = 1000
    forward_rows: int = 0

    def __post_init__(self) -> None:
        if self.background is None:
            chosen = "continuous" if self.ablate_fraction <= CONTINUOUS_UP_TO else "mixed"
            object.__setattr__(self, "background", chosen)
        check_design(self.ablate_fraction, str(self.background))
        whole = isinstance(self.passes, int) and not isinstance(self.passes, bool) and 2 <= self.passes <= 2**15 - 1
        if self.passes != "auto" and not whole:
            raise FitError(f"passes is {self.passes!r}, expected an integer from 2 to {2**15 - 1:,}, or 'auto'.")
        if not 0 < self.tolerance < 1:
            raise FitError(f"tolerance is {self.tolerance}, expected a number between 0 and 1.")
        if not FIRST_LOOK <= self.most_passes <= 2**15 - 1:
            raise FitError(f"most_passes is {self.most_passes}, expected {FIRST_LOOK} to {2**15 - 1:,}.")
        if self.forward_rows and not 10 <= self.forward_rows <= 10_000:
            raise FitError(f"forward_rows is {self.forward_rows}, expected 0 (none), or 10 to 10,000.")

    def memory(self, components: int) -> int:
        """Returns the bytes of one example: its sums, and the float64 arrays of the last step."""
        return components * (BYTES + 40 * 8) + self.forward_rows * 16

    def fixed_memory(self, components: int) -> int:
        """Returns the bytes of a small matrix per component, of forward rows, and of libraries' buffers."""
        rows = self.forward_rows
        return components * (3 * 8 * MOST_SHARED**2 + 33 * rows) + 56 * rows**2 + 32 * 2**20

    def work(self, components: int) -> float | None:
        """Returns the forwards of an example; None for "auto"."""
        return None if isinstance(self.passes, str) else self.passes * (1 + BACKWARD) + self.forward_rows

    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block; errors as `Engine.gate_gradients`, and FitError."""
        components = len(engine.index)
        require_components(engine)
        design = GateDesign(components, self.ablate_fraction, str(self.background), seed)
        passes = design.passes(range(first, first + len(examples)))
        dtype = torch.float64 if engine.precision == "float64" else torch.float32
        sums = GradientSums(len(examples), components, dtype)
        layers = np.unique(engine.index.columns["module"], return_inverse=True)[1]
        closed = engine.ablation.closed  # the gate of an ablated component: 0, or a factor
        look, posterior = FIRST_LOOK, None
        limit = self.most_passes if self.passes == "auto" else int(self.passes)
        while sums.passes < limit:
            gates = passes.next()
            values = torch.from_numpy(closed + (1 - closed) * gates.gates()).to(dtype)
            outputs, gradients = engine.gate_gradients(values, examples)
            sums.add(gates, outputs, gradients * (1 - closed) if closed else gradients)
            posterior = None
            if self.passes == "auto" and sums.passes >= look:
                look += max(1, look // 2)
                posterior = shrink(Moments.of(sums, passes.start), layers)
                if self._error(posterior) <= self.tolerance:
                    break
        moments = Moments.of(sums, passes.start)
        posterior = posterior or shrink(moments, layers)
        bias = sums.output.numpy() / sums.passes - (posterior.mean * moments.mean_gates(sums)).sum(axis=1)
        if self.forward_rows:
            rows = KeepPlan(components, self.forward_rows, self.ablate_fraction, seed ^ FORWARD_SEED)
            keep = rows.take(0, self.forward_rows)
            observed = engine.outputs(keep, examples).numpy().astype(np.float64)
            posterior, bias = refine(posterior, keep, observed)
        return BlockEstimate(
            weights=posterior.mean.astype(np.float32),
            stderr=np.sqrt(posterior.variance).astype(np.float32),
            bias=bias.astype(np.float32),
            passes=np.full(len(examples), sums.passes, dtype=np.float32),
        )

    def _error(self, posterior: Posterior) -> float:
        """Returns the mean over examples of the share of the predictions' variance that is estimation error."""
        error = posterior.variance.sum(axis=1)
        whole: npt.NDArray[Any] = (posterior.mean**2).sum(axis=1) + error
        return float((error / np.maximum(whole, 1e-300)).mean())
