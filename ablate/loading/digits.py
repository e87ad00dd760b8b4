"""A small real task with a spurious cue, on scikit-learn's handwritten digits, and a residual CNN to learn it.

1,797 real images. The label is whether the digit is 5 or more; a background of stripes (vertical or horizontal) agrees
with it in 95 % of the training images and in 50 % of the validation and test images, as the backgrounds of Waterbirds
do. A network that looks at the stripes is good on average and bad on the groups where they disagree.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.data.examples import Examples
from ablate.errors import LoadError
from ablate.loading.training import train_classifier, trained_or_cached
from ablate.state import preserved_random_state

SPLITS = {"train": 997, "validation": 400, "test": 400}
CUE_AGREES = {"train": 0.95, "validation": 0.5, "test": 0.5}
CLASSES = ("low", "high")  # digits 0-4, digits 5-9
CUES = ("vertical", "horizontal")  # the cue that agrees with low, with high
MINORITY_GROUPS = ("low-horizontal", "high-vertical")
CUE_STRENGTH = 0.5


def digits_split(split: str, seed: int = 0) -> Examples:
    """Returns one split of the task: inputs (examples, 1, 16, 16) float32 in [-1, 2], labels 0 and 1, four groups.

    Groups are named `low-vertical`, `low-horizontal`, `high-vertical`, `high-horizontal`; ids name scikit-learn's
    image. The seed decides which image is in which split and which gets which cue.
    """
    with preserved_random_state():  # importing scikit-learn draws from Python's generator
        from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise LoadError(f"No split {split!r} of the digits task; splits are {', '.join(SPLITS)}.")
    images, digits = load_digits(return_X_y=True)
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(digits))
    first = sum(SPLITS[name] for name in list(SPLITS)[: list(SPLITS).index(split)])
    chosen = order[first : first + SPLITS[split]]
    labels = (digits[chosen] >= 5).astype(np.int64)
    cues = _cues(labels, CUE_AGREES[split], np.random.default_rng([seed, 2, list(SPLITS).index(split)]))
    groups = [f"{CLASSES[label]}-{CUES[cue]}" for label, cue in zip(labels, cues, strict=True)]
    return Examples(_draw(images[chosen], cues), labels, [f"digit-{i:04d}" for i in chosen], groups)


def _cues(labels: npt.NDArray[np.int64], agrees: float, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Returns a cue per example; within each class the share that agrees with the label is exact (to rounding)."""
    cues = labels.copy()
    for label in (0, 1):
        members = generator.permutation(np.flatnonzero(labels == label))
        against = members[round(agrees * len(members)) :]
        cues[against] = 1 - label
    return cues


def _draw(images: npt.NDArray[np.float64], cues: npt.NDArray[np.int64]) -> Tensor:
    """Returns the images at 16 x 16 pixels over stripes two pixels wide, shifted to about zero mean."""
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    digits = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    bars = (torch.arange(16) // 2 % 2).float() * CUE_STRENGTH
    vertical, horizontal = bars.expand(16, 16), bars[:, None].expand(16, 16)
    stripes = torch.stack([vertical, horizontal])[torch.as_tensor(cues)][:, None]
    return (digits + stripes - 0.5).contiguous()


def digits_campaign_examples(train_per_group: int, test_per_group: int, seed: int = 0) -> Examples:
    """Returns the first so many training and test examples of each group: what the demo's campaign runs on.

    Ids keep their split: `train/digit-0815`.
    """
    if train_per_group + test_per_group < 1:
        raise LoadError("No digits asked for: give train_per_group or test_per_group (or a split).")
    parts = [("train", train_per_group), ("test", test_per_group)]
    inputs, targets, ids, groups = [], [], [], []
    for split, count in parts:
        examples = digits_split(split, seed)
        for group in sorted(set(examples.groups)):
            members = [i for i, g in enumerate(examples.groups) if g == group]
            if len(members) < count:
                raise LoadError(f"Group {group!r} of the {split} split has {len(members)} examples, not {count}.")
            for i in members[:count]:
                inputs.append(examples.input(i))
                targets.append(int(examples.targets[i]))
                ids.append(f"{split}/{examples.ids[i]}")
                groups.append(group)
    return Examples(torch.stack(inputs), targets, ids, groups)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, (batch, channels, height, width)."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A residual network for 16 x 16 images: stem, three stages of two blocks, mean pool, linear head.

    At the default widths: 736 convolution filters.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 64), classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(2):
                blocks.append(ResidualBlock(channels, width, 2 if stage == 1 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (batch, classes) of images (batch, 1, height, width)."""
        features = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def digits_model(seed: int = 0, cache: str | os.PathLike[str] | None = None, epochs: int = 6) -> ResidualCNN:
    """Returns the trained network of a seed, in eval mode. Deterministic by seed (same machine and thread count).

    Args:
      seed: Of the splits, the cues, the initial weights and the order of training.
      cache: A .safetensors file: read if it is there, else trained (a few seconds on two cores) and written.
      epochs: Passes over the training split.

    Raises:
      LoadError: The cache is damaged, or was trained with another seed or number of epochs.
    """

    def make() -> ResidualCNN:
        torch.manual_seed(seed)
        return ResidualCNN()

    def train(model: ResidualCNN) -> None:
        train_classifier(model, digits_split("train", seed), epochs, rate=2e-3)

    return trained_or_cached(make, train, cache, {"seed": seed, "epochs": epochs})
