"""A toy to try editing methods on: a small trained network with a weakness that is known, and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import Examples, preserved_random_state

SIZE, THIRD, STICKER = 12, 4, 3
TRAIN, REFERENCE, VALIDATION, ALL = 60, 90, 120, 180
STEPS, RATE = 30, 1e-2


@dataclass(frozen=True, eq=False)
class StickerToy:
    """Images of three classes; a sticker in the corner makes the network say class 0.

    Attributes:
      model: In eval mode; modules 0 and 2 are convolutions.
      images, stickers: (180, 1, 12, 12): without and with the sticker.
      labels: (180,).
      masks: (180, 12, 12): 1 where the sticker is.
      failed: Positions of the training images that the network has wrong because of the sticker.
      reference: Ordinary images.
      validation: (images with stickers, ordinary ones), to choose a strength on.
      test: The same in a third part, by name: `stickers` and `ordinary`.
    """

    model: nn.Module
    images: Tensor
    stickers: Tensor
    labels: Tensor
    masks: Tensor
    failed: Tensor
    reference: Examples
    validation: tuple[Examples, Examples]
    test: Mapping[str, Examples]


def sticker_toy(seed: int = 0) -> StickerToy:
    """Returns the toy; its network is trained in about a second. The global random state is unchanged."""
    with preserved_random_state():
        torch.manual_seed(seed)
        labels = torch.arange(ALL) % 3
        images = 0.5 * torch.randn(ALL, 1, SIZE, SIZE)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, THIRD * label : THIRD * (label + 1)] += 0.5  # a brighter third says which class it is
        model = _trained(images[:TRAIN], labels[:TRAIN])
    masks = torch.zeros(ALL, SIZE, SIZE)
    masks[:, :STICKER, :STICKER] = 1.0
    stickers = torch.where(masks[:, None] > 0, torch.tensor(4.0), images)
    with torch.no_grad():
        right = model(images[:TRAIN]).argmax(1) == labels[:TRAIN]
        wrong = model(stickers[:TRAIN]).argmax(1) != labels[:TRAIN]

    def part(inputs: Tensor, start: int, stop: int) -> Examples:
        return Examples(inputs[start:stop], labels[start:stop])

    return StickerToy(
        model=model,
        images=images,
        stickers=stickers,
        labels=labels,
        masks=masks,
        failed=torch.nonzero(right & wrong).flatten(),
        reference=part(images, TRAIN, REFERENCE),
        validation=(part(stickers, REFERENCE, VALIDATION), part(images, REFERENCE, VALIDATION)),
        test={"stickers": part(stickers, VALIDATION, ALL), "ordinary": part(images, VALIDATION, ALL)},
    )


def _trained(images: Tensor, labels: Tensor) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()
