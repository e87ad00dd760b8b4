"""The published way to run a network under a keep-vector, written anew from its description, to be timed beside ours.

Per keep-vector: a deep copy of the model on the CPU, a linear search for the layer of every ablated component, index
assignment, the move to the device, a data loader from start to end, autocast, margins fetched batch by batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ablate import Margin


def published_loop(
    model: nn.Module,
    components: Mapping[str, int],
    keep: npt.NDArray[np.bool_],
    loader: DataLoader[Any],
    device: torch.device,
) -> Tensor:
    """Returns the margins (examples,) of one keep-vector; `components` gives each parameter's number of rows."""
    ablated = copy.deepcopy(model).cpu().eval()
    parameters = dict(ablated.named_parameters())
    chosen: dict[str, list[int]] = {}
    for component in np.flatnonzero(~keep):
        name, row = _find(int(component), components)
        chosen.setdefault(name, []).append(row)
    with torch.no_grad():
        for name, rows in chosen.items():
            parameters[name][rows] = 0
    ablated = ablated.to(device)
    margins = []
    with torch.no_grad():
        for images, labels in loader:
            with torch.autocast("cuda", enabled=device.type == "cuda"):
                logits = ablated(images.to(device))
            margins.append(Margin()(logits.float(), labels.to(device)).cpu())
    ablated.cpu()
    return torch.cat(margins)


def _find(component: int, components: Mapping[str, int]) -> tuple[str, int]:
    first = 0
    for name, count in components.items():
        if component < first + count:
            return name, component - first
        first += count
    raise IndexError(component)
