"""Free masks: one mask per sample, optimised for that sample alone, which the hypernetwork then learns to predict."""

from __future__ import annotations

import torch
from torch import Tensor

from coar.editing.masks.inner import InnerLoop
from coar.editing.masks.settings import MetaSettings


def free_masks(
    inner: InnerLoop, inputs: Tensor, teacher: Tensor, bits: int, settings: MetaSettings, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns free masks (samples, bits), the labels made of them, and the losses (samples,) at the last step.

    A mask is sigmoid(free_slope * z), z drawn uniformly from -1 to 1 and moved by `free_steps` updates; its label is
    sigmoid(label_slope * z). Mutates nothing.

    Args:
      inner: The problem they solve.
      inputs, teacher: Its samples and the logits they should keep.
      bits: Length of a mask.
      settings: Those named `free_*`, and `label_slope`.
      draw: On the CPU.

    Cost: `free_steps * (inner_steps + 1)` forward and backward passes per sample.
    """
    start = torch.rand(len(inputs), bits, generator=draw) * 2 - 1
    z = start.to(inputs.device).requires_grad_()
    optimizer = optimizer_of(z, settings)
    losses = inputs.new_zeros(len(inputs))
    for _ in range(settings.free_steps):
        with torch.enable_grad():
            masks = torch.sigmoid(settings.free_slope * z)
        losses, gradient = inner.objective(masks, inputs, teacher)
        (z.grad,) = torch.autograd.grad(masks, z, gradient)
        optimizer.step()
    final = z.detach()
    return torch.sigmoid(settings.free_slope * final), torch.sigmoid(settings.label_slope * final), losses


def optimizer_of(z: Tensor, settings: MetaSettings) -> torch.optim.Optimizer:
    """Returns a new optimiser of free masks."""
    if settings.free_optimizer == "adam":
        return torch.optim.Adam([z], lr=settings.free_rate)
    return torch.optim.RMSprop([z], lr=settings.free_rate)
