"""How many classes a model has, found out by running it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablate.logits import OutputKey, logits_of
from ablate.state import preserved_random_state


def class_count(model: nn.Module, inputs: Tensor, output_key: OutputKey = None) -> int | None:
    """Returns how many logits `model` gives for each example, or None if it gives something else, or fails.

    Args:
      model: In eval mode; unchanged after.
      inputs: Of one example, (1, ...), prepared; where the model is.
      output_key: Where in what the model returns the logits are, as for `Engine`.

    Cost: one forward. A model that fails is named where it is used, not here.
    """
    try:
        with torch.no_grad(), preserved_random_state():
            logits = logits_of(model(inputs), output_key)
    except Exception:  # whatever a model raises
        return None
    if logits.ndim != 2 or len(logits) != len(inputs) or logits.shape[1] < 2:
        return None
    return int(logits.shape[1])
