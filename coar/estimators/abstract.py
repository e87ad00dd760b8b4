"""What every estimator is that asks the model directly: settings, and an answer for one block of examples at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ablate import Engine, Examples

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockEstimate:
    """One linear attribution for each example of a block: `output(keep) ~ bias + sum_i weights_i * keep_i`.

    Attributes:
      weights: (examples, components) float32, in units of the output.
      stderr: Standard error of each weight, same shape: zero where nothing was sampled.
      bias: (examples,) float32.
      passes: (examples,) how many forward, or forward and backward, passes each example took.
    """

    weights: Floats
    stderr: Floats
    bias: Floats
    passes: Floats


@dataclass(frozen=True)
class Estimator(ABC):
    """Estimates attributions of a block of examples by running the model. A frozen dataclass of its settings.

    Subclass it as `@dataclass(frozen=True)`, set `name`, implement `estimate` and `memory`, and pass an instance as
    `coar.estimate(..., method=...)`. What it samples depends on (seed, position of the example), never on the block
    or on the order of blocks; what it pools, it pools inside one block.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False  # whether `coar.estimate` checks first that there are any

    @abstractmethod
    def estimate(self, engine: Engine, examples: Examples, first: int, seed: int) -> BlockEstimate:
        """Returns the attributions of a block of examples. Mutates nothing.

        Args:
          engine: The model, its index and output.
          examples: The block.
          first: Position of the block's first example among all.
          seed: Of everything that is sampled.
        """

    @abstractmethod
    def memory(self, components: int) -> int:
        """Returns the bytes that one example of a block takes, apart from the engine's own forward."""

    def fixed_memory(self, components: int) -> int:
        """Returns the bytes that a block takes whatever the number of its examples."""
        return 0

    def work(self, components: int) -> float | None:
        """Returns about how many forwards an example takes, a backward counted as two, for the progress.

        None if that is not known before; then the progress learns it from the first block.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Returns the method and its settings as JSON-able values: what a store of estimates is bound to."""
        return {"method": self.name, **asdict(self)}
