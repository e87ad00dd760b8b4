"""Convolutions of any dimension, plain and transposed: where their filters are in the weight, and what these make.

A plain convolution's weight is (out, in / groups, ...): filter i is row i and makes channel i. A transposed one's is
(in, out / groups, ...): filter i is column i. With several groups column i makes channel i *of every group*, which is
then one component; where each group makes a single channel, the rows of that group are its filter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = PLAIN + TRANSPOSED


class Filters(NamedTuple):
    """The axis of a convolution's weight along which its filters lie, in how many equal runs; None: one per slice."""

    axis: int
    runs: int | None = None


def filters_of(module: nn.Module) -> Filters | None:
    """Returns where the filters of a convolution are, None for anything else."""
    if isinstance(module, PLAIN):
        return Filters(0)
    if not isinstance(module, TRANSPOSED):
        return None
    if module.groups > 1 and module.out_channels == module.groups:
        return Filters(0, module.groups)
    return Filters(1)


def per_channel(values: Tensor, width: int, channels: int) -> Tensor:
    """Returns values of components (..., components) as values of the channels (..., channels) that these make or read.

    Args:
      values: One per component of a port.
      width: Slices of the weight that one component is.
      channels: How many the layer has there. As many as components: one each. More than slices: a slice makes one
        channel of every group.
    """
    if values.shape[-1] == channels:
        return values
    if width > 1:
        values = values.repeat_interleave(width, dim=-1)
    groups = channels // values.shape[-1]
    return values if groups == 1 else torch.cat([values] * groups, dim=-1)
