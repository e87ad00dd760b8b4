"""What every number here rests on, checked on a model as it is: the same input, the same logits, whatever runs beside.

The engine's probe checks it on its own float64 copy, and learns more. Here nothing is copied or cast, so that it can be
asked of any model that is about to be run as it is: before it is edited, before it is judged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablate.gating.probe import checked_runs, distinct_pair
from ablate.logits import OutputKey, logits_alone
from ablate.state import preserved_random_state

TOLERANCE = 1e-5  # of the logits, at least; in lower precisions the root of their rounding


def require_steady(model: nn.Module, inputs: Tensor, output_key: OutputKey = None) -> None:
    """Raises unless a model gives two examples the same logits every time, and each its own. Mutates nothing.

    Cost: four forward passes of one or two examples; some more if the model draws random numbers.

    Args:
      model: In eval mode, in any precision.
      inputs: (1 or 2, ...), as the model takes them; of a single one its mirror image is the second.
      output_key: Where in what the model returns the logits are, as for `ablate.Engine`.

    Raises:
      GatingError: The model is random in eval mode, or its examples influence each other; names the module.
      DataError: It fails on them.
    """
    pair = inputs if len(inputs) > 1 else torch.cat([inputs, inputs.flip(-1)])
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    rounding = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    with preserved_random_state(), logits_alone(model, output_key):
        checked_runs(model, {}, distinct_pair(pair), tolerance=max(TOLERANCE, rounding**0.5))
