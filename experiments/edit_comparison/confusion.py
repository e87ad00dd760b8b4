"""Task (c): systematic confusions of a shifted sub-population, each repaired from a single image.

A plain classifier of ten digits meets slanted, turned or shifted ones and takes one digit for another again and again.
A failure group is all such images of one class that the network takes for the same wrong class. Each edit sees one
image of a group and is judged on the others; locality on images that the network gets right, but only just.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import Examples
from experiments.edit_comparison.images import CORRUPTIONS, digits, image_ids, split_positions
from experiments.edit_comparison.networks import Lesson, usual_lesson
from experiments.edit_comparison.tasks import SHIFT, Case, Pairs, Split, Task, renamed

SIZE = 16
EDITED, GROUP = "the edited image", "the rest of its group"
SMALLEST = {"test": 20, "validation": 8}  # images in a group
# name -> (turned by degrees, slanted, shifted in half widths)
SHIFTS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {f"turned {d}": (float(d), 0.0, 0.0) for d in (-45, -35, 35, 45)}
    | {f"slanted {s}": (0.0, s, 0.0) for s in (-0.8, -0.5, 0.5, 0.8)}
    | {f"shifted {t}": (0.0, 0.0, t) for t in (-0.35, 0.35)}
)


def plain_examples(split: str, seed: int) -> Examples:
    """Returns a split: ten classes of digits as they are."""
    positions = split_positions(split, seed)
    images, labels = digits(positions, SIZE)
    return Examples(images - SHIFT, labels, image_ids(positions))


def lessons(network: str, seed: int) -> tuple[Lesson, ...]:
    """Returns how a network is trained."""
    return (usual_lesson(network, plain_examples("train", seed)),)


def shifted(images: Tensor, name: str) -> Tensor:
    """Returns images (n, 1, size, size) turned, slanted or shifted; what comes in at the edge is background."""
    degrees, slant, shift = SHIFTS[name]
    turn = np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, slant], [0, 1]])
    theta = torch.tensor(np.concatenate([matrix, [[shift], [0]]], axis=1), dtype=torch.float32)
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + SHIFT, grid, align_corners=False) - SHIFT


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the model's class probabilities, (n, classes)."""
    return torch.cat([model(part).softmax(1) for part in torch.split(images, 256)])


def confusions(model: nn.Module, examples: Examples) -> dict[tuple[str, int, int], list[int]]:
    """Returns (shift, class, the class it is taken for) -> positions of such images."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for name in SHIFTS:
        predicted = probabilities(model, shifted(examples.inputs(), name)).argmax(1)
        for i, (label, taken) in enumerate(zip(examples.targets.tolist(), predicted.tolist(), strict=True)):
            if label != taken:
                found.setdefault((name, label, taken), []).append(i)
    return found


def chosen_groups(model: nn.Module, seed: int, count: int) -> list[tuple[str, int, int]]:
    """Returns the confusions with the most validation images, no class twice, that are large enough in both splits.

    The test split is asked only whether a group has its 20 images; what is chosen is ordered by validation images.
    """
    sizes = {
        split: {key: len(members) for key, members in confusions(model, plain_examples(split, seed)).items()}
        for split in SMALLEST
    }
    chosen: list[tuple[str, int, int]] = []
    for key in sorted(sizes["validation"], key=lambda key: (-sizes["validation"][key], key)):
        enough = all(sizes[split].get(key, 0) >= smallest for split, smallest in SMALLEST.items())
        if enough and key[1] not in {label for _, label, _ in chosen}:
            chosen.append(key)
    return chosen[:count]


def task(network: str, model: nn.Module, seed: int, groups: int = 2, edits: int = 6, validation_edits: int = 3) -> Task:
    """Returns the task of a seed for the model that fails; `edits` single images of each of `groups` groups.

    `validation_edits` are made, of other images of the same groups, to choose settings.
    """
    chosen = chosen_groups(model, seed, groups)
    if not chosen:
        raise ValueError(f"The {network} of seed {seed} has no group of {SMALLEST['test']} like failures.")
    train = plain_examples("train", seed)

    def split(name: str) -> Split:
        plain = plain_examples(name, seed)
        found = confusions(model, plain)
        members = {i for key in chosen for i in found[key]}
        count = edits if name == "test" else validation_edits
        cases = tuple(case for key in chosen for case in _cases(plain, found[key], key, count))
        others = plain.take([i for i in range(len(plain)) if i not in members])
        return Split(cases, others, locality(model, others))

    return Task(
        name="confusion",
        title="Single-example edits of systematic confusions",
        network=network,
        seed=seed,
        train=train,
        reference=train.take(range(200)),
        validation=split("validation"),
        test=split("test"),
        success=GROUP,
        kept="locality",
        held_out=(GROUP,),
        notes={"groups": [f"{label} taken for {taken}, {name}" for name, label, taken in chosen]},
    )


def _cases(plain: Examples, members: list[int], key: tuple[str, int, int], edits: int) -> list[Case]:
    name, label, taken = key
    images = plain.take(members)
    group = Pairs(renamed(images, shifted(images.inputs(), name), name.replace(" ", "")))
    return [
        Case(
            f"{label} taken for {taken}, {name}",
            group.take([i]),
            {GROUP: group.take([j for j in range(len(group)) if j != i]), EDITED: group.take([i])},
        )
        for i in range(min(edits, len(group)))
    ]


def locality(model: nn.Module, examples: Examples, most: int = 150, gap: float = 0.5) -> Examples:
    """Returns images that the model gets right, but only just: the smallest first, p1 - p2 below `gap`.

    Each image comes once, as it is or under the corruption that makes it closest.
    """
    versions = {"plain": examples.inputs()} | {name: f(examples.inputs()) for name, f in CORRUPTIONS.items()}
    gaps = []
    for images in versions.values():
        p = probabilities(model, images)
        top = p.topk(2).values
        right = p.argmax(1) == examples.targets
        gaps.append(torch.where(right, top[:, 0] - top[:, 1], torch.inf))
    smallest, version = torch.stack(gaps).min(0)
    order = [int(i) for i in smallest.argsort(stable=True)[:most] if smallest[i] < gap]
    stacked = torch.stack(list(versions.values()))
    chosen = examples.take(order)
    ids = [f"{name}/{list(versions)[int(version[i])]}" for name, i in zip(chosen.ids, order, strict=True)]
    return Examples(stacked[version[order], order], chosen.targets, ids, chosen.groups)
