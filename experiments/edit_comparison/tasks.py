"""What a task is: what a network learns, what is wrong with it, and on which images edits are chosen and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ablate import Examples
from experiments.edit_comparison.images import CORRUPTIONS, corrupted

SHIFT = 0.3  # taken off pixels in [0, 1], so that inputs have about zero mean


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images that an edit should change, x', beside what they were before, x.

    Attributes:
      examples: x', (n, 1, height, width), with the labels that the edited model should give.
      originals: x, aligned with x'; None: there is no image that differs in the concept only.
      masks: (n, height, width), 1 where the concept is: x' equals x elsewhere. None: not known.
    """

    examples: Examples
    originals: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, positions: Sequence[int] | npt.NDArray[Any]) -> Pairs:
        """Returns the pairs at these positions."""
        chosen = torch.as_tensor(np.asarray(positions, dtype=np.int64))
        return Pairs(
            self.examples.take(positions),
            None if self.originals is None else self.originals[chosen],
            None if self.masks is None else self.masks[chosen],
        )


@dataclass(frozen=True, eq=False)
class Case:
    """One thing to be repaired: what a method is given, and the sets that its edit is judged on.

    Attributes:
      name: E.g. `class 4, snow`.
      exemplars: What the method is given.
      sets: Name -> images that should become right; the first is what settings are chosen by.
    """

    name: str
    exemplars: Pairs
    sets: Mapping[str, Pairs]


@dataclass(frozen=True, eq=False)
class Split:
    """The cases of one split, and its ordinary images: none of either is in another split."""

    cases: tuple[Case, ...]
    ordinary: Examples
    locality: Examples

    def image_ids(self) -> set[str]:
        """Returns the names of all images that edits are judged on."""
        sets = [pairs.examples for case in self.cases for pairs in case.sets.values()]
        return {image_id(name) for examples in [*sets, self.ordinary, self.locality] for name in examples.ids}


@dataclass(frozen=True, eq=False)
class Task:
    """One task for one network and seed.

    Attributes:
      name: `cue`, `concept` or `confusion`.
      title: In words.
      network: Its name.
      seed: Of the splits, of the network and of what is drawn.
      train: What the network learned from.
      reference: Ordinary training images: what methods are given as what should stay.
      validation: Where settings are chosen, and nothing else.
      test: Where chosen edits are judged.
      success: The set in each case's `sets` that is the headline: the y axis.
      kept: `ordinary` or `locality`: the x axis.
      held_out: The sets that show textures, images or styles that no exemplar shows.
    """

    name: str
    title: str
    network: str
    seed: int
    train: Examples
    reference: Examples
    validation: Split
    test: Split
    success: str
    kept: str
    held_out: tuple[str, ...] = ()
    notes: Mapping[str, object] = field(default_factory=dict)


def image_id(name: str) -> str:
    """Returns the name of scikit-learn's image in an id like `digit-0815` or `digit-0815/snow`."""
    return name.partition("/")[0]


def corrupted_versions(examples: Examples) -> dict[str, Examples]:
    """Returns the set under every corruption: its out-of-distribution versions."""
    return {name: corrupted(examples, name) for name in CORRUPTIONS}


def renamed(examples: Examples, inputs: Tensor, suffix: str) -> Examples:
    """Returns examples with other images; the suffix after the image's name says what was done to it."""
    ids = [f"{image_id(name)}/{suffix}" for name in examples.ids]
    return Examples(inputs, examples.targets, ids, examples.groups)
