"""The control that every experiment with masks needs: as many components, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coar.editing.log import EditLog
from coar.editing.masks.binarise import binarise
from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.masked import MaskedEditor
from coar.editing.request import Request


@dataclass(frozen=True, kw_only=True)
class RandomMask(MaskedEditor):
    """Control: tunes components drawn at random by the seed, as many as a learned mask of this density has.

    Cost: a forward and a backward pass over the inputs per step.
    """

    name: ClassVar[str] = "random-mask"
    title: ClassVar[str] = "Random mask (control)"
    source: ClassVar[str] = "Yang et al., Learning where to edit vision transformers (arXiv 2411.01948), Section 5"
    needs: ClassVar[tuple[str, ...]] = ("labels",)
    quick: ClassVar[Mapping[str, Any]] = {"density": 0.25, "rate": 1e-3, "steps": 10}

    density: float | None = 0.05

    def bits(self, model: nn.Module, layout: MaskLayout, request: Request, log: EditLog) -> Tensor:
        """Returns the components that were drawn."""
        order = torch.randperm(layout.bits, generator=torch.Generator().manual_seed(self.seed))
        return binarise((order + 1.0) / layout.bits, density=self.density)
