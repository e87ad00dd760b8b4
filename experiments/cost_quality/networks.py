"""The networks of the comparison, trained on scikit-learn's handwritten digits in seconds, and cached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import ComponentIndex, Examples, preserved_random_state
from ablate.digits import ResidualCNN
from ablate.loading import TorchvisionModel, load_model
from ablate.loading.training import train_classifier, trained_or_cached

TRAIN = 1397  # of 1,797 images; the rest are test images


def digits_examples(split: str, size: int = 16, channels: int = 1) -> Examples:
    """Returns the training or test images of the digits, (examples, channels, size, size).

    The label is whether the digit is 5 or more. Always the same split: the order is drawn once, with seed 0.
    """
    with preserved_random_state():  # importing scikit-learn draws from Python's generator
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:TRAIN] if split == "train" else order[TRAIN:]
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[chosen] / 16
    inputs = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False) - 0.3
    digits = labels[chosen.numpy()]
    ids = [f"digit-{int(i):04d}" for i in chosen]
    return Examples(inputs.expand(-1, channels, -1, -1).contiguous(), (digits >= 5).astype("int64"), ids, digits)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, tokens, width)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(mixed)
        hidden: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return hidden


class SmallViT(nn.Module):
    """A vision transformer for 16 x 16 images in patches of 4 x 4: four blocks, 2,304 neurons at width 64."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (batch, classes) of images (batch, 1, 16, 16)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


# name: how to make it, its kind of component, epochs, learning rate
NETWORKS: dict[str, tuple[Any, str, int, float]] = {
    "cnn-736": (lambda: ResidualCNN((32, 64, 64)), "conv_filter", 20, 6e-3),
    "cnn-2208": (lambda: ResidualCNN((96, 192, 192)), "conv_filter", 15, 6e-3),
    "vit-2304": (SmallViT, "linear_neuron", 30, 1e-3),
    "resnet50": (lambda: _resnet50(), "conv_filter", 20, 2e-3),
}


def input_shape(name: str) -> tuple[int, int]:
    """Returns the size and the channels of a network's inputs."""
    return (224, 3) if name == "resnet50" else (16, 1)


def _resnet50() -> nn.Module:
    """Returns torchvision's ResNet-50 with two classes, weights random."""
    model, _ = load_model(TorchvisionModel(source="torchvision", name="resnet50"))
    model.fc = nn.Linear(2048, 2)
    return model


def trained_network(name: str, cache: str | os.PathLike[str]) -> tuple[nn.Module, ComponentIndex]:
    """Returns a trained network in eval mode and its component index (the classes' own rows are no components).

    Trained where no cached weights are, in some seconds to a minute on two cores; deterministic on one machine.
    """
    make, kind, epochs, rate = NETWORKS[name]

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = make()
        return model.cuda() if name == "resnet50" and torch.cuda.is_available() else model

    def train(model: nn.Module) -> None:
        train_classifier(model, digits_examples("train", *input_shape(name)), epochs, rate)

    settings = {"network": name, "epochs": epochs, "rate": rate}
    model = trained_or_cached(seeded, train, Path(cache) / f"{name}.safetensors", settings)
    if name == "resnet50":
        return model, ComponentIndex.from_preset(model, "coar-resnet")
    exclude = ("head",) if kind == "linear_neuron" else ()
    return model, ComponentIndex.from_model(model, [kind], exclude=exclude)
