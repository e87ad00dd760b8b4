"""Masked fine-tuning, what all mask editors end in: `FineTuning` of the chosen components, and of no other weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ablate import Selection
from coar.editing.abstract import Editor, Found
from coar.editing.log import EditLog
from coar.editing.masks.binarise import check_choice
from coar.editing.masks.layout import MaskLayout
from coar.editing.methods.finetune import FineTuning
from coar.editing.request import Request
from coar.editing.settings import Count, FromZero, Positive
from coar.editing.where.defaults import last_feed_forward_blocks


@dataclass(frozen=True, kw_only=True)
class MaskedEditor(Editor):
    """Base of the methods that choose some of the selected components and fine-tune those on the labels.

    Attributes:
      density: Share of the selected components that are tuned.
      rate: Of RMSprop (P: 2e-5 for ViT-B, 1e-4 for ViT-S).
      steps: At most so many updates.
      stop_loss: It ends, before an update, when every label is predicted and the mean cross-entropy is this or
        less; None: not before the last.
    """

    density: float | None = 0.05
    rate: Positive = 2e-5
    steps: Count = 100
    stop_loss: FromZero | None = 0.01

    def _problems(self) -> list[str]:
        check_choice(self.density, self.limit)
        return []

    @property
    def limit(self) -> float | None:
        """The threshold above which a component is chosen, where the method has one."""
        return None

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns the feed-forward networks of three blocks near the end; without any, the last three convolutions."""
        return last_feed_forward_blocks(model, 3)

    @abstractmethod
    def bits(self, model: nn.Module, layout: MaskLayout, request: Request, log: EditLog) -> Tensor:
        """Returns which of the layout's components to tune, (bits,) bool."""

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the change that fine-tuning the chosen components makes, and which they are."""
        layout = MaskLayout(selection)
        bits = self.bits(model, layout, request, log)
        log.entries["mask"] = describe_bits(layout, bits)
        return self._tuning().find(model, layout.chosen(bits), request, log)

    def _tuning(self) -> FineTuning:
        return FineTuning(seed=self.seed, rate=self.rate, steps=self.steps, stop_loss=self.stop_loss)


def describe_bits(layout: MaskLayout, bits: Tensor) -> Mapping[str, Any]:
    """Returns how many components a mask chose, of how many, in all and per gated tensor. JSON-able."""
    rows = [
        {"parameter": row.parameter, "kind": row.kind, "chosen": int(bits[row.span].sum()), "of": len(row.units)}
        for row in layout.rows
    ]
    return {"chosen": int(bits.sum()), "of": layout.bits, "density": int(bits.sum()) / layout.bits, "rows": rows}
