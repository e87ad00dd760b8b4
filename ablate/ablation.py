"""What a closed gate leaves behind: nothing of the weights, the component's mean, or a share of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ablate.data.examples import Examples
from ablate.errors import DataError, UnknownNameError


class Ablation(ABC):
    """What ablating a component does. `closed` is the gate of an ablated component."""

    name: str
    closed: float = 0.0

    @abstractmethod
    def describe(self) -> str:
        """Returns the ablation as a store records it."""


class ZeroAblation(Ablation):
    """The published COAR convention: the component's weights become zero; bias and normalisation stay.

    Source: COAR (arXiv 2404.11534), Section 2.
    """

    name = "zero"

    def describe(self) -> str:
        """Returns `zero`."""
        return self.name


class ScaleAblation(Ablation):
    """The component's weights are multiplied by a factor: 0.5 damps, 2 doubles, -1 turns round."""

    name = "scale"

    def __init__(self, factor: float) -> None:
        self.closed = float(factor)

    def describe(self) -> str:
        """Returns `scale` and the factor."""
        return f"scale {self.closed!r}"


class MeanAblation(Ablation):
    """The component's activation becomes its mean over a reference set, over examples and positions.

    Args:
      reference: Examples, a Dataset, or a tensor of inputs (examples, ...). Streamed once.
    """

    name = "mean"

    def __init__(self, reference: Any) -> None:
        if isinstance(reference, Tensor):
            reference = Examples(reference, torch.zeros(len(reference), dtype=torch.int64))
        self.reference = Examples.of(reference)

    def describe(self) -> str:
        """Returns `mean` and the hash of the reference set."""
        return f"mean over {self.reference.hash}"


def ablation_names() -> tuple[str, ...]:
    """Returns the names of the ablations a spec may ask for."""
    return (ZeroAblation.name, MeanAblation.name, ScaleAblation.name)


def get_ablation(ablation: str | Ablation) -> Ablation:
    """Returns the ablation of this name, or the instance given."""
    if isinstance(ablation, Ablation):
        return ablation
    if ablation == ZeroAblation.name:
        return ZeroAblation()
    known = {"mean": "ablate.MeanAblation(reference)", "scale": "ablate.ScaleAblation(factor)"}
    if ablation in known:
        raise DataError(f"ablation is {ablation!r}, which needs an argument: pass {known[ablation]}.")
    raise UnknownNameError("ablation", str(ablation), ablation_names())
