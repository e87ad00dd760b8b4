"""Pseudo-samples for meta-training: images with a rectangle of another image pasted in, which a model should ignore."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.index.kinds import Anatomy
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditError

_RATIO = (3 / 4, 4 / 3)  # of the sides of a random crop, as in image classification's usual augmentation


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class Pasted(NamedTuple):
    """Pairs of images: `clean` and `mixed` (pairs, channels, height, width), and what was pasted over."""

    clean: Tensor
    mixed: Tensor
    boxes: tuple[Box, ...]


def patch_of(model: nn.Module) -> tuple[int, int] | None:
    """Returns the (height, width) of the patches that a vision transformer cuts an image into, None for others."""
    if not Anatomy(model).attentions:
        return None
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or tuple(first.kernel_size) != tuple(first.stride) or max(first.stride) == 1:
        return None
    return int(first.stride[0]), int(first.stride[1])


def paste(images: Tensor, settings: MetaSettings, patch: tuple[int, int] | None, draw: torch.Generator) -> Pasted:
    """Returns the first half of the images, clean and with a rectangle of the second half's. Mutates nothing.

    Image i takes its rectangle from image i + pairs, at the same place. Height, width and place are drawn
    independently: in steps of whole patches if `patch` is given, else of pixels. Pairs whose pasting changes no pixel
    (two images with the same background there) teach nothing and are left out.

    Args:
      images: (2 * pairs, channels, height, width).
      settings: `patch_smallest`, `patch_largest` and `reach_edge` count.
      patch: Height and width of a patch in pixels; None: pixels.
      draw: On the CPU.

    Raises:
      EditError: An odd number of images, images too small for the rectangle, or no pair left.
    """
    if images.ndim != 4 or len(images) < 2 or len(images) % 2:
        raise EditError(
            f"Images have shape {tuple(images.shape)}, expected (examples, channels, height, width) with an even "
            "number of examples, at least 2: each needs another to take a rectangle from."
        )
    pairs = len(images) // 2
    clean, partner = images[:pairs], images[pairs:]
    steps = patch or (1, 1)
    boxes, mixed = [], clean.clone()
    for i in range(pairs):
        (top, height), (left, width) = (
            _side(size, step, settings, draw) for size, step in zip(images.shape[2:], steps, strict=True)
        )
        boxes.append(Box(top, left, height, width))
        window = (i, slice(None), slice(top, top + height), slice(left, left + width))
        mixed[window] = partner[window]
    differs = (mixed != clean).flatten(1).any(dim=1)
    if not differs.any():
        raise EditError(
            "No image changes when a rectangle of another is pasted in: the images are all alike. Give reference "
            "images that differ."
        )
    kept = tuple(box for box, keep in zip(boxes, differs.tolist(), strict=True) if keep)
    return Pasted(clean[differs], mixed[differs], kept)


def _side(size: int, step: int, settings: MetaSettings, draw: torch.Generator) -> tuple[int, int]:
    """Returns where a rectangle begins and how long it is along one axis, in pixels."""
    cells = size // step
    smallest = max(1, round(settings.patch_smallest * cells))
    largest = max(smallest, round(settings.patch_largest * cells))
    places = 1 if settings.reach_edge else 0
    if cells - largest + places < 1:
        raise EditError(
            f"An image side of {size} pixels is {cells} x {step}: too short to place a rectangle of up to {largest} x "
            f"{step}. Give larger images, or a smaller patch_largest."
        )
    length = int(torch.randint(smallest, largest + 1, (1,), generator=draw))
    start = int(torch.randint(0, cells - length + places, (1,), generator=draw))
    return start * step, length * step


def random_crops(images: Tensor, smallest: float, draw: torch.Generator) -> Tensor:
    """Returns each image cropped to a random share of its area and resized to its old size. Mutates nothing.

    Args:
      images: (examples, channels, height, width).
      smallest: The smallest share of the area; 1: the images as they are.
      draw: On the CPU.
    """
    if smallest == 1:
        return images
    height, width = images.shape[2:]
    cropped = []
    for image in images:
        share, ratio, y, x = torch.rand(4, generator=draw).tolist()
        area = height * width * (smallest + share * (1 - smallest))
        log = math.log(_RATIO[0]) + ratio * (math.log(_RATIO[1]) - math.log(_RATIO[0]))
        tall = min(height, max(1, round(math.sqrt(area / math.exp(log)))))
        wide = min(width, max(1, round(math.sqrt(area * math.exp(log)))))
        top, left = int(y * (height - tall + 1)), int(x * (width - wide + 1))
        part = image[None, :, top : top + tall, left : left + wide]
        cropped.append(F.interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(cropped)
