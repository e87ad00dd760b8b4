"""What an edit is and does to a model, alone: a selection, an operation on it, a strength; applying changes a copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ablate import ModelMismatchError, Selection, model_hash
from ablate.gating.literal import replaced
from ablate.models.buffers import describe_weights, same_weights
from ablate.models.copies import copy_with
from coar.editing.edits.covered import covered
from coar.editing.edits.frozen import frozen, plain_number
from coar.editing.edits.operations import Ablate, Operation
from coar.editing.edits.roles import notes_on, require_one_value, wrapping
from coar.errors import EditError, EditMismatchError

Norms = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class EditValue:
    """The fields of an `Edit`, which says what they are, and how they change a model."""

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
                f"operation is {self.operation!r}, expected one of coar.editing.edits.operations: Ablate(), "
                "Scale(factor), LowRank(...), Delta(...)."
            )
        if not (math.isfinite(self.alpha) if self.extrapolates else 0.0 <= self.alpha <= 1.0):
            what = "a finite number" if self.extrapolates else "0 (the original model) to 1 (the full edit)"
            raise EditError(f"alpha is {self.alpha}, expected {what}.")
        if not len(self.selection) and not self.operation.whole:
            raise EditError("The selection is empty: there is nothing to edit. Select at least one component.")

    def __repr__(self) -> str:
        beside = f" and {len(self.operation.whole)} whole parameters" if self.operation.whole else ""
        return (
            f"<{type(self).__name__}: {self.operation.name} {len(self.selection):,} of {len(self.selection.index):,} "
            f"components{beside} at alpha={self.alpha:g}, by {self.method}>"
        )

    def at(self, alpha: float, *, extrapolate: bool = False) -> Self:
        """Returns this edit at another strength. The models along alpha lie on a straight line between two weights.

        Args:
          alpha: 0 is the original model, bit for bit; 1 the full edit.
          extrapolate: Allow strengths outside of 0 to 1.
        """
        return replace(self, alpha=alpha, extrapolates=extrapolate)

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

    def measured(self, model: nn.Module, *, any_weights: bool = False) -> Self:
        """Returns this edit with the norms of what it changes and notes on it, from the model. Mutates nothing."""
        full = replace(self, alpha=1.0, extrapolates=False).changed_weights(model, any_weights=any_weights)
        parameters = dict(model.named_parameters())
        norms = {}
        for name, value in full.items():
            before = parameters[name].detach()
            norms[name] = (_norm(before), _norm(value - before))
        return replace(self, norms=norms, notes=notes_on(model, full))

    def from_base(self, model: nn.Module) -> Self:
        """Returns this edit with every change as a difference, given the model it was made for. Mutates nothing.

        For edits of format 1 and 2, whose files hold end points only: those fit other weights after this.

        Raises:
          EditMismatchError: It is another model.
        """
        self.check(model)
        return replace(self, operation=self.operation.with_starts(model, self.selection))

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
