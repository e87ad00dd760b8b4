"""From a selection to the weights that it covers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablate import Selection
from ablate.gating.literal import touched_slices


def covered(selection: Selection, model: nn.Module) -> dict[str, Tensor]:
    """Returns per touched parameter a bool tensor of its shape and device, True where the selection covers a weight.

    Mutates nothing. Biases are covered by kinds that include them (`residual_branch`) only.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for name, axis, units in touched_slices(selection, parameters):
        parameter = parameters[name]
        if name not in found:
            found[name] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        found[name].index_fill_(axis, torch.tensor(units, device=parameter.device), True)
    return found
