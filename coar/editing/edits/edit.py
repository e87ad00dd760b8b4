"""Edit: a selection, an operation on it and a strength. A value: applying one never changes the model it is given."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pandas as pd
from torch import nn

from coar.editing.edits.chain import chain
from coar.editing.edits.describing import description
from coar.editing.edits.together import together
from coar.editing.edits.value import EditValue
from coar.editing.edits.writing import save_edit
from coar.errors import EditError


@dataclass(frozen=True, repr=False)
class Edit(EditValue):
    """What to change in a model, and how strongly. Immutable.

    Attributes:
      selection: The components that are changed.
      operation: What happens to their weights: `Ablate()`, `Scale(factor)`, `LowRank(...)`, `Delta(...)`. Biases and
        normalisation stay, unless a `Delta` names them.
      alpha: Strength from 0 (the original model, bit for bit) to 1 (the full edit).
      base: Hash of the model's weights that the edit was made for; None: any model its index describes.
      method: What found it.
      details: How: JSON-able, e.g. the ranking and the predicted effects.
      norms: Per changed parameter the norms of its original value and of its change at alpha 1, where they are known.
      extrapolates: Whether alpha, or that of a part, may lie outside of 0 to 1.
      notes: Per changed parameter what else is worth knowing: other uses of the tensor, adapters beside it that stay.
    """

    def __add__(self, other: Edit) -> Edit:
        """Returns the edit that does both. Their weights must be distinct, unless both ablate at one alpha.

        Raises:
          EditError: They belong to different models or indices, or change the same weights; names the parameters.
        """
        if not isinstance(other, Edit):
            raise EditError(f"An edit adds to another edit only, got a {type(other).__name__}.")
        return together(self, other)

    def then(self, other: Edit, *, any_weights: bool = False) -> Edit:
        """Returns the edit that does first this one, then the other: a chain, which is saved as one file.

        At alpha 1 it is `other.apply(self.apply(model))`, bit for bit; in between, the models lie on the straight line
        from the original to that end, whatever the way the links took.

        Args:
          other: Found on what this edit gives.
          any_weights: Take also an edit that was found on other weights, e.g. on the same model as this one: its
            change is added as a difference.

        Raises:
          EditError: They have different indices, or both were found on one model and `any_weights` is not set. Whether
            the other was found on what this one gives is seen when the chain is applied.
        """
        if not isinstance(other, Edit):
            raise EditError(f"After an edit comes another edit, got a {type(other).__name__}.")
        return chain(self, other, any_weights)

    def describe(self, model: nn.Module | None = None, *, any_weights: bool = False) -> pd.DataFrame:
        """Returns what the edit touches, and how much, one row per module. Mutates nothing.

        Columns: module, kind, edited (components), parameters (in them), components (of the module in the index), and
        `relative_change`: norm of the change at this alpha over the norm of the module's changed tensors before. It is
        there if the edit was found by a method, or the model is given; NaN where the norms of a chain's or a sum's
        parts do not tell it. Whole parameters beyond components (biases, normalisation) have rows of kind "parameter".
        `note`, if there is one, says which other parameters are the same tensor and change with it, and which adapters
        beside a wrapped layer stay.
        """
        return description(self if model is None else self.measured(model, any_weights=any_weights))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit, its change only, as safetensors with a JSON header. Overwrites a file of that name."""
        save_edit(self, path)
