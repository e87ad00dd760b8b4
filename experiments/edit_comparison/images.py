"""Handwritten digits, how they are split, the textures beside them, and what corrupts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ablate import Examples, preserved_random_state

SPLITS: Mapping[str, int] = MappingProxyType({"train": 850, "exemplars": 200, "validation": 247, "test": 500})
Ints = npt.NDArray[np.int64]


@cache
def _digits() -> tuple[Tensor, Ints]:
    with preserved_random_state():  # importing scikit-learn draws from Python's generator
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, labels.astype(np.int64)


def split_positions(split: str, seed: int) -> Ints:
    """Returns which of scikit-learn's 1,797 digits are in a split; splits of one seed share none."""
    order = np.random.default_rng([seed, 11]).permutation(sum(SPLITS.values()))
    first = sum(SPLITS[name] for name in list(SPLITS)[: list(SPLITS).index(split)])
    return order[first : first + SPLITS[split]].astype(np.int64)


def digits(positions: Ints, size: int) -> tuple[Tensor, Ints]:
    """Returns digits drawn at size x size pixels, (n, 1, size, size) in [0, 1], and which digit each is."""
    images, labels = _digits()
    drawn = F.interpolate(images[torch.as_tensor(positions)], size=(size, size), mode="bilinear", align_corners=False)
    return drawn, labels[positions]


def image_ids(positions: Ints) -> list[str]:
    """Returns the names of scikit-learn's images, as in the demo: what splits are compared by."""
    return [f"digit-{i:04d}" for i in positions]


def stripes(size: int, width: int = 2, horizontal: bool = True, phase: int = 0) -> Tensor:
    """Returns bars of 0 and 1, (size, size), each `width` pixels wide."""
    bars = ((torch.arange(size) + phase) // width % 2).float()
    return bars[:, None].expand(size, size) if horizontal else bars.expand(size, size)


def diagonals(size: int, width: int) -> Tensor:
    """Returns diagonal bars of 0 and 1, (size, size), each `width` pixels wide along a row."""
    places = torch.arange(size)
    return ((places[:, None] + places) // width % 2).float()


def checks(size: int, width: int) -> Tensor:
    """Returns a chessboard of 0 and 1, (size, size), with fields of `width` pixels."""
    fields = torch.arange(size) // width
    return ((fields[:, None] + fields) % 2).float()


def speckles(size: int, grain: int, level: float, contrast: float, seed: int) -> Tensor:
    """Returns a field of random spots, (size, size) in [0, 1]: like snow or gravel.

    Args:
      size: Of the field, in pixels.
      grain: Size of a spot in pixels.
      level: Mean brightness.
      contrast: Half the range between the darkest and the brightest spot.
      seed: Which field.
    """
    cells = -(-size // grain)
    drawn = torch.rand(1, 1, cells, cells, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    spots = F.interpolate(drawn, scale_factor=grain, mode="nearest")[0, 0, :size, :size]
    return (level + contrast * spots).clamp(0, 1)


def _noise(images: Tensor, amount: float) -> Tensor:
    generator = torch.Generator().manual_seed(17)
    return images + amount * torch.randn(images.shape, generator=generator)


def _blur(images: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel)


def _contrast(images: Tensor) -> Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + 0.6 * (images - mean)


# Simple ones of our own: not the levels of ImageNet-C, whose images are larger.
CORRUPTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "noise": lambda images: _noise(images, 0.2),
        "blur": _blur,
        "contrast": _contrast,
        "brightness": lambda images: images + 0.15,
    }
)


def corrupted(examples: Examples, name: str) -> Examples:
    """Returns the same examples with corrupted images, the same ones at each call."""
    return Examples(CORRUPTIONS[name](examples.inputs()), examples.targets, examples.ids, examples.groups)
