"""How often the model is right before anything is ablated: a model at chance, or labels in another order, show here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from torch import nn

from ablate import Examples
from ablate.data.classes import class_count
from ablate.logits import OutputKey
from coar.editing.predicting import predictions
from coar.errors import CoarError
from coar.metrics.accuracies import Accuracy

SECONDS = 5.0  # about how long predicting may take
MOST = 1024  # examples: enough to tell chance from skill, and 50 % from 53 %
CHUNK = 32
LEVEL = 0.05  # of the test against chance
LEAST = 20  # examples, to say that labels are in another order
RENAMED = 0.25  # how much more must agree when the labels are renamed, as a share of the examples

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unablated:
    """The accuracy of the model as it is, on some of the examples.

    Attributes:
      accuracy: Of the examples that were predicted.
      examples: How many there are in all.
      chance: The accuracy of a model that knows nothing of the images.
      chance_is: What that is, in words.
      p: The probability of an accuracy at least as high by chance (one-sided binomial test).
      renamed: The share that would be right if each label were the class that is predicted most for its other
        examples; None where several labels would become the same class.
    """

    accuracy: Accuracy
    examples: int
    chance: float
    chance_is: str
    p: float
    renamed: float | None

    @property
    def warning(self) -> str | None:
        """What is wrong with the accuracy, in a sentence; None: nothing, or the examples are too few to tell."""
        renamed = self.renamed if self.accuracy.examples >= LEAST else None
        if renamed is not None and renamed >= self.accuracy.value + RENAMED:
            return (
                f"Warning: with the labels renamed {100 * renamed:.1f} % would be right: the labels seem to be in "
                "another order than the model's classes. Say which label is which class (`classes` of an image folder)."
            )
        if self.p > LEVEL >= self.chance**self.accuracy.examples:
            return (
                f"Warning: that is at chance, {100 * self.chance:.1f} % ({self.chance_is}; binomial test, p = "
                f"{self.p:.2g}). Check the labels, the checkpoint and the preprocessing: attributions of such outputs "
                "tell nothing about what the model can do."
            )
        return None

    def text(self) -> str:
        """Returns the accuracy as a line, and what is wrong with it as another."""
        some = "" if self.accuracy.examples == self.examples else f" ({self.accuracy.examples:,} drawn of all)"
        line = (
            f"Unablated accuracy: {self.accuracy.right:,} of {self.accuracy.examples:,} examples{some} are right, "
            f"{100 * self.accuracy.value:.1f} %."
        )
        return line if self.warning is None else f"{line}\n{self.warning}"

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON-able values."""
        own = {name: getattr(self, name) for name in ("chance", "chance_is", "p", "renamed", "warning")}
        counts = {"right": self.accuracy.right, "examples": self.accuracy.examples, "of": self.examples}
        return {**counts, "accuracy": self.accuracy.value, **own}


def unablated_accuracy(
    model: nn.Module, examples: Examples, seconds: float = SECONDS, output_key: OutputKey = None
) -> Unablated | None:
    """Returns how often `model` predicts the label; None where predictions are not one class per example.

    Of many examples some are drawn at random, always the same. Mutates nothing.

    Cost: forwards of at most 1,024 examples, begun for at most `seconds`.
    """
    if examples.per_token:
        return None
    classes = class_count(model, examples.model_inputs(0, 1), output_key)
    if classes is None or int(examples.targets.min()) < 0:
        return None
    order = np.random.default_rng(0).permutation(len(examples))[:MOST]
    found: list[Integers] = []
    end = time.monotonic() + seconds
    for start in range(0, len(order), CHUNK):
        if found and time.monotonic() > end:
            break
        try:
            drawn = examples.take(np.sort(order[start : start + CHUNK]))
            found.append(predictions(model, drawn, output_key=output_key))
        except CoarError:  # labels beyond the classes, infinite logits: named by the engine, which knows the output
            return None
    predicted = np.concatenate(found)
    chosen = [np.sort(order[start : start + CHUNK]) for start in range(0, len(predicted), CHUNK)]
    labels = examples.targets.numpy()[np.concatenate(chosen)]
    right = int((predicted == labels).sum())
    chance, chance_is = _chance(examples.targets.numpy(), classes)
    p = float(binomtest(right, len(labels), chance, alternative="greater").pvalue)
    return Unablated(
        Accuracy(right, len(labels)), len(examples), chance, chance_is, p, _renamed(predicted.tolist(), labels.tolist())
    )


def _chance(labels: npt.NDArray[Any], classes: int) -> tuple[float, str]:
    """Returns the accuracy of guessing, and how one would guess."""
    counts = np.bincount(labels, minlength=classes)
    if (counts > 0).all():  # else the most frequent label says more about the choice of examples than about the model
        return float(counts.max() / counts.sum()), f"always saying the most frequent class, {int(counts.argmax())}"
    return 1 / classes, f"one of {classes:,} classes"


def _renamed(predicted: Sequence[int], labels: Sequence[int]) -> float | None:
    """Returns the share of examples predicted as the class that is most predicted for the others of their label."""
    counts = {label: Counter[int]() for label in labels}
    for guess, label in zip(predicted, labels, strict=True):
        counts[label][guess] += 1
    favourites = [most for count in counts.values() for most, _ in count.most_common(1)]
    if len(set(favourites)) < len(favourites):
        return None
    agreeing = 0
    for guess, label in zip(predicted, labels, strict=True):
        others = counts[label] - Counter([guess])
        agreeing += bool(others) and others[guess] == max(others.values())
    return agreeing / len(labels)
