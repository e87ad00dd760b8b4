"""The two networks that are edited: a residual CNN with batch norm and a small timm ViT, trained in seconds, cached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ablate import Examples
from ablate.digits import ResidualCNN
from ablate.loading import TimmModel, load_model
from ablate.loading.training import train_classifier, trained_or_cached

PATCH, BLOCKS = 4, 4


@dataclass(frozen=True, eq=False)
class Lesson:
    """A part of a network's training: on what, and how."""

    examples: Examples
    epochs: int
    rate: float


def usual_lesson(network: str, examples: Examples) -> Lesson:
    """Returns the whole training of a network that needs no preparation."""
    return Lesson(examples, 12, 4e-3) if network == "cnn" else Lesson(examples, 40, 1e-3)


def make_network(name: str, classes: int, size: int, seed: int) -> nn.Module:
    """Returns an untrained network for images (batch, 1, size, size). `size` is a multiple of 4 for the ViT."""
    torch.manual_seed(seed)
    return ResidualCNN((16, 32, 32), classes) if name == "cnn" else _vit(classes, size, seed)


def _vit(classes: int, size: int, seed: int) -> nn.Module:
    """Returns four blocks of timm's test_vit (width 64), with patches of 4 x 4 pixels of one channel."""
    source = TimmModel(source="timm", name="test_vit", classes=classes, image_size=size // PATCH * 16, seed=seed)
    model: Any = load_model(source)[0]
    embedding = model.patch_embed
    embedding.proj = nn.Conv2d(1, embedding.proj.out_channels, PATCH, PATCH)
    embedding.patch_size, embedding.img_size = (PATCH, PATCH), (size, size)
    model.blocks = model.blocks[:BLOCKS]
    network: nn.Module = model
    return network


def trained_network(
    name: str,
    task: str,
    lessons: Sequence[Lesson],
    classes: int,
    seed: int,
    cache: str | os.PathLike[str] | None,
) -> nn.Module:
    """Returns the network of a task in eval mode, without gradients; trained where the cache folder has none.

    Args:
      name: `cnn` or `vit`.
      task: Names the file in the cache.
      lessons: What it learns, one after the other.
      classes: How many.
      seed: Of the first weights and of the order of training.
      cache: A folder; None: always trained.
    """
    size = lessons[0].examples.inputs(0, 1).shape[-1]
    parts = [f"{lesson.examples.hash[:16]} x {lesson.epochs} at {lesson.rate}" for lesson in lessons]
    settings = {"task": task, "network": name, "seed": seed, "lessons": ", ".join(parts)}
    path = None if cache is None else Path(cache) / f"{task}-{name}-seed{seed}.safetensors"

    def train(model: nn.Module) -> None:
        for lesson in lessons:
            train_classifier(model, lesson.examples, lesson.epochs, lesson.rate)

    return trained_or_cached(lambda: make_network(name, classes, size, seed), train, path, settings)
