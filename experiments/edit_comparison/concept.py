"""Task (b): the border of an image, horizontal stripes where the digit is even, is covered by another texture.

As in rewriting a classifier's rules: a network has learned what stands where (even digits on a `road` of horizontal
stripes, odd ones by a fence of vertical stripes or a plain wall), and fails where the road is covered by snow.
Exemplars are of one class and one texture; the edit should help that class, the other classes on the road, and textures
that no exemplar shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ablate import Examples
from experiments.edit_comparison.images import checks, diagonals, digits, image_ids, speckles, split_positions, stripes
from experiments.edit_comparison.networks import Lesson, usual_lesson
from experiments.edit_comparison.tasks import SHIFT, Case, Pairs, Split, Task, renamed

SIZE, BORDER = 20, 4
CONCEPT_CLASSES = (0, 2, 4, 6, 8)  # on the road
# share of training images whose border is the other parity's: without any, the ViT asks the border alone for the
# parity, is right on no covered image, and no edit helps a class without exemplars
EXCEPTIONS: Mapping[str, float] = MappingProxyType({"cnn": 0.0, "vit": 0.05})
SMALLEST_DROP = 0.15  # of accuracy on validation images, as in the papers: else there is nothing to repair
# style -> its textures: the first is the exemplars', the others are held out
STYLES: Mapping[str, tuple[Tensor, ...]] = MappingProxyType(
    {
        "snow": (speckles(SIZE, 1, 0.7, 0.3, 0), speckles(SIZE, 2, 0.7, 0.3, 1), speckles(SIZE, 4, 0.7, 0.3, 2)),
        "hatching": tuple(diagonals(SIZE, width) * 0.7 for width in (2, 1, 3)),
        "checks": tuple(checks(SIZE, width) * 0.7 for width in (2, 1, 4)),
        "gravel": (speckles(SIZE, 1, 0.4, 0.4, 3), speckles(SIZE, 2, 0.4, 0.4, 4), speckles(SIZE, 4, 0.4, 0.4, 5)),
    }
)
TARGET, OTHER = "target class", "other classes"
TARGET_HELD_OUT, OTHER_HELD_OUT = "target class, held-out textures", "other classes, held-out textures"


def border() -> Tensor:
    """Returns the concept's region, (size, size): 1 on the border, 0 where the digit is."""
    region = torch.ones(SIZE, SIZE)
    region[BORDER:-BORDER, BORDER:-BORDER] = 0
    return region


def plain_examples(split: str, seed: int, exceptions: float = 0.0) -> Examples:
    """Returns a split: digits with their borders, in ten classes; groups are `road` and `elsewhere`.

    `exceptions`: share of images with the border of the other parity.
    """
    positions = split_positions(split, seed)
    drawn, labels = digits(positions, SIZE - 2 * BORDER)
    images = torch.zeros(len(labels), 1, SIZE, SIZE)
    images[:, :, BORDER:-BORDER, BORDER:-BORDER] = drawn
    swapped = np.random.default_rng([seed, 14]).random(len(labels)) < exceptions
    on_road = np.isin(labels, CONCEPT_CLASSES) ^ swapped
    for i, position in enumerate(positions):  # what is drawn for an image depends on the image and the seed alone
        chance = np.random.default_rng([seed, 12, int(position)])
        bars = stripes(SIZE, 2, bool(on_road[i]), int(chance.integers(4))) * chance.uniform(0.5, 0.9)
        if not on_road[i] and chance.random() < 0.5:
            bars = torch.full((SIZE, SIZE), chance.uniform(0.0, 0.9))
        bars = bars + 0.05 * torch.tensor(chance.normal(size=(SIZE, SIZE)), dtype=torch.float32)
        images[i, 0] += border() * bars
    groups = ["road" if on else "elsewhere" for on in on_road]
    return Examples(images - SHIFT, labels, image_ids(positions), groups)


def lessons(network: str, seed: int) -> tuple[Lesson, ...]:
    """Returns how a network is trained."""
    return (usual_lesson(network, plain_examples("train", seed, EXCEPTIONS[network])),)


def restyled(examples: Examples, style: str, textures: tuple[int, ...], seed: int) -> Pairs:
    """Returns the images on the road with one of the style's textures in its place; drawn where several are given."""
    on_road = examples.take([i for i, group in enumerate(examples.groups) if group == "road"])
    originals = on_road.inputs()
    chance = np.random.default_rng([seed, 13])
    which = chance.choice(textures, size=len(on_road))
    texture = torch.stack([STYLES[style][t] for t in which])[:, None] - SHIFT
    region = border()
    inputs = torch.where(region.bool(), texture, originals)
    return Pairs(
        renamed(on_road, inputs, f"{style}-{'-'.join(map(str, textures))}"),
        originals,
        region.expand(len(on_road), -1, -1).contiguous(),
    )


def task(network: str, model: nn.Module, seed: int, exemplars: int = 3, cases: int = 2) -> Task:
    """Returns the task of a seed; `exemplars` images of one class per case, at most 10.

    A case per style that the model fails on: the first `cases` whose drop on validation images is large enough.
    """
    if not 1 <= exemplars <= 10:
        raise ValueError(f"exemplars is {exemplars}, expected 1 to 10.")
    drops = style_drops(model, seed)
    styles = [style for style, drop in drops.items() if drop >= SMALLEST_DROP][:cases]
    if not styles:
        raise ValueError(f"The {network} of seed {seed} fails on no style; accuracy drops by {drops}.")
    targets = [CONCEPT_CLASSES[(2 * seed + i) % len(CONCEPT_CLASSES)] for i in range(len(styles))]
    given = plain_examples("exemplars", seed)
    shown = [
        _of_class(restyled(given, style, (0,), seed), target, True).take(range(exemplars))
        for target, style in zip(targets, styles, strict=True)
    ]
    train = plain_examples("train", seed, EXCEPTIONS[network])

    def split(name: str) -> Split:
        plain = plain_examples(name, seed)
        parts = tuple(
            Case(f"class {target}, {style}", pairs, _cells(plain, style, target, seed))
            for target, style, pairs in zip(targets, styles, shown, strict=True)
        )
        return Split(parts, plain, plain)

    return Task(
        name="concept",
        title="Concept transformation: the road under even digits is covered",
        network=network,
        seed=seed,
        train=train,
        reference=train.take(range(200)),
        validation=split("validation"),
        test=split("test"),
        success=OTHER,
        kept="ordinary",
        held_out=(TARGET_HELD_OUT, OTHER_HELD_OUT),
        notes={"targets": targets, "styles": styles, "exemplars": exemplars},
    )


@torch.no_grad()
def style_drops(model: nn.Module, seed: int) -> dict[str, float]:
    """Returns per style what its textures cost in accuracy on the validation images on the road."""
    plain = plain_examples("validation", seed)
    drops = {}
    for style, textures in STYLES.items():
        pairs = restyled(plain, style, tuple(range(len(textures))), seed)
        originals = pairs.originals if pairs.originals is not None else pairs.examples.inputs()
        right = [model(x).argmax(1) == pairs.examples.targets for x in (originals, pairs.examples.inputs())]
        drops[style] = float(right[0].float().mean() - right[1].float().mean())
    return drops


def _cells(plain: Examples, style: str, target: int, seed: int) -> dict[str, Pairs]:
    """Returns the four cells; `all` first, which settings are chosen by: every class, the exemplars' texture."""
    known = restyled(plain, style, (0,), seed)
    held_out = restyled(plain, style, tuple(range(1, len(STYLES[style]))), seed)
    return {
        "all classes": known,
        TARGET: _of_class(known, target, True),
        OTHER: _of_class(known, target, False),
        TARGET_HELD_OUT: _of_class(held_out, target, True),
        OTHER_HELD_OUT: _of_class(held_out, target, False),
    }


def _of_class(pairs: Pairs, target: int, same: bool) -> Pairs:
    labels = pairs.examples.targets
    return pairs.take(torch.nonzero((labels == target) == same).flatten().tolist())
