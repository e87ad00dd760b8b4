"""Edit: a selection, an operation on it and a strength. A value: applying one never changes the model it is given."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ablate import ModelMismatchError, Selection, model_hash
from ablate.buffers import describe_weights, same_weights
from ablate.copying import copy_with
from ablate.gating import replaced
from coar.editing.describing import description
from coar.editing.frozen import frozen, plain_number
from coar.editing.operations import Ablate, Operation
from coar.editing.roles import notes_on, require_one_value, wrapping
from coar.editing.weights import covered
from coar.errors import EditError, EditMismatchError

Norms = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Edit:
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

    selection: Selection
    operation: Operation = field(default_factory=Ablate)
    alpha: float = 1.0
    base: str | None = None
    method: str = "by hand"
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    norms: Norms = field(default_factory=dict, hash=False, compare=False)
    extrapolates: bool = field(default=False, compare=False)
    notes: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", plain_number("alpha", self.alpha))
        for name in ("details", "norms", "notes"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        if not isinstance(self.operation, Operation):
            raise EditError(
                f"operation is {self.operation!r}, expected one of coar.editing.operations: Ablate(), Scale(factor), "
                "LowRank(...), Delta(...)."
            )
        if not (math.isfinite(self.alpha) if self.extrapolates else 0.0 <= self.alpha <= 1.0):
            what = "a finite number" if self.extrapolates else "0 (the original model) to 1 (the full edit)"
            raise EditError(f"alpha is {self.alpha}, expected {what}.")
        if not len(self.selection) and not self.operation.whole:
            raise EditError("The selection is empty: there is nothing to edit. Select at least one component.")

    def __repr__(self) -> str:
        beside = f" and {len(self.operation.whole)} whole parameters" if self.operation.whole else ""
        return (
            f"<Edit: {self.operation.name} {len(self.selection):,} of {len(self.selection.index):,} components{beside} "
            f"at alpha={self.alpha:g}, by {self.method}>"
        )

    def at(self, alpha: float, *, extrapolate: bool = False) -> Edit:
        """Returns this edit at another strength. The models along alpha lie on a straight line between two weights.

        Args:
          alpha: 0 is the original model, bit for bit; 1 the full edit.
          extrapolate: Allow strengths outside of 0 to 1.
        """
        return replace(self, alpha=alpha, extrapolates=extrapolate)

    def __add__(self, other: Edit) -> Edit:
        """Returns the edit that does both. Their weights must be distinct, unless both ablate at one alpha.

        Raises:
          EditError: They belong to different models or indices, or change the same weights; names the parameters.
        """
        from coar.editing.together import together

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
        from coar.editing.chain import chain

        return chain(self, other, any_weights)

    def apply(self, model: nn.Module, *, any_weights: bool = False, share: bool = False) -> nn.Module:
        """Returns a new model with the edit; the model given is unchanged, and independent of the new one.

        Args:
          model: The model the edit was made for.
          any_weights: Apply also to a model of the same structure with other weights, e.g. one edited before: a delta
            adds its difference there, so that the order of such edits does not matter but for rounding.
          share: Parameters that are not edited share their memory with the model's: cheaper, but who trains one of the
            two, changes it in place or loads weights into it changes both.

        Raises:
          EditMismatchError: The edit was made for another model.
        """
        return copy_with(model, self.changed_weights(model, any_weights=any_weights), share)

    @contextmanager
    def applied(self, model: nn.Module, *, any_weights: bool = False) -> Iterator[nn.Module]:
        """Gives the model with the edit, for the time of a `with` block; restores it bit for bit, also on error."""
        with replaced(model, self.changed_weights(model, any_weights=any_weights)):
            yield model

    def changed_weights(self, model: nn.Module, *, any_weights: bool = False) -> dict[str, Tensor]:
        """Returns the new value of each parameter that the edit changes, by name; none at alpha 0. Mutates nothing.

        Raises:
          EditMismatchError: The edit was made for another model.
        """
        self.check(model, any_weights=any_weights)
        if self.alpha == 0:
            return {}
        where = covered(self.selection, model)
        parameters = dict(model.named_parameters())
        changed = {}
        with torch.no_grad():
            for name in self.operation.parameters(where):
                weight = parameters.get(name)
                if weight is None:
                    raise EditMismatchError(f"This edit changes {name!r}, which this {type(model).__name__} lacks.")
                mask = where.get(name)
                if mask is None:
                    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
                changed[name] = self.operation.change(name, weight.detach(), mask, self.alpha)
        require_one_value(model, changed)
        return changed

    def measured(self, model: nn.Module, *, any_weights: bool = False) -> Edit:
        """Returns this edit with the norms of what it changes and notes on it, from the model. Mutates nothing."""
        full = replace(self, alpha=1.0, extrapolates=False).changed_weights(model, any_weights=any_weights)
        parameters = dict(model.named_parameters())
        norms = {}
        for name, value in full.items():
            before = parameters[name].detach()
            norms[name] = (_norm(before), _norm(value - before))
        return replace(self, norms=norms, notes=notes_on(model, full))

    def from_base(self, model: nn.Module) -> Edit:
        """Returns this edit with every change as a difference, given the model it was made for. Mutates nothing.

        For edits of format 1 and 2, whose files hold end points only: those fit other weights after this.

        Raises:
          EditMismatchError: It is another model.
        """
        self.check(model)
        return replace(self, operation=self.operation.with_starts(model, self.selection))

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
        from coar.editing.files import save_edit

        save_edit(self, path)

    def check(self, model: nn.Module, *, any_weights: bool = False) -> None:
        """Raises EditMismatchError unless the edit fits this model. Cost: a hash of the model."""
        try:
            self.selection.index.check(model)
        except ModelMismatchError as error:
            raise EditMismatchError(
                f"This edit was made for another model: give that one, or find an edit for this one. {error}"
                f"{wrapping(model)}"
            ) from error
        if self.base is not None and not (any_weights and not self.operation.end_points):
            self._check_weights(model, any_weights)
        if not any_weights:
            self.operation.check(model)

    def _check_weights(self, model: nn.Module, any_weights: bool) -> None:
        found = model_hash(model)
        if found == self.base or same_weights(self.details.get("model_weights", {}), describe_weights(model)):
            return
        made = (
            f"This edit was made for a model with weights {str(self.base)[:12]}, this {type(model).__name__} has "
            f"{found[:12]}"
        )
        if any_weights:
            names = ", ".join(map(repr, self.operation.end_points[:3]))
            names += " ..." if len(self.operation.end_points) > 3 else ""
            raise EditMismatchError(
                f"{made}. It says where {names} should end, not by how much to move: a file of an earlier format. Load "
                "it with the model it was made for, "
                "coar.load_edit(path, base=model), which gives the difference."
            )
        raise EditMismatchError(
            f"{made}: its components mean something else. Give the original model; or, if that is what you want (e.g. "
            "a second edit on top of a first), pass any_weights=True."
        )


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
