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
from ablate.copying import copy_with
from ablate.gating import replaced
from coar.editing.operations import Ablate, Operation
from coar.editing.weights import covered, overlap
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
      extrapolates: Whether alpha may lie outside of 0 to 1.
    """

    selection: Selection
    operation: Operation = field(default_factory=Ablate)
    alpha: float = 1.0
    base: str | None = None
    method: str = "by hand"
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    norms: Norms = field(default_factory=dict, hash=False, compare=False)
    extrapolates: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
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

    def apply(self, model: nn.Module, *, any_weights: bool = False, share: bool = True) -> nn.Module:
        """Returns a new model with the edit; the model given is unchanged.

        Args:
          model: The model the edit was made for.
          any_weights: Apply also to a model of the same structure with other weights, e.g. one edited before.
          share: Parameters that are not edited share their memory with the model's. Pass False to train the result,
            or to change it in place.

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
        self._check(model, any_weights)
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
        return changed

    def measured(self, model: nn.Module) -> Edit:
        """Returns this edit with the norms of what it changes, from the model it was made for. Mutates nothing."""
        full = replace(self, alpha=1.0, extrapolates=False).changed_weights(model)
        parameters = dict(model.named_parameters())
        norms = {}
        for name, value in full.items():
            before = parameters[name].detach()
            norms[name] = (_norm(before), _norm(value - before))
        return replace(self, norms=norms)

    def describe(self, model: nn.Module | None = None) -> pd.DataFrame:
        """Returns what the edit touches, and how much, one row per module. Mutates nothing.

        Columns: module, kind, edited (components), parameters (in them), components (of the module in the index), and
        `relative_change`: norm of the change at this alpha over the norm of the module's changed tensors before. It is
        there if the edit was found by a method, or the model is given. Whole parameters beyond components (biases,
        normalisation) have rows of kind "parameter".
        """
        norms = self.measured(model).norms if model is not None else self.norms
        rows = self._rows()
        if not norms:
            return pd.DataFrame(rows).drop(columns="_tensors")
        for row in rows:
            pairs = [norms[name] for name in row["_tensors"] if name in norms]
            before, change = (math.sqrt(sum(pair[i] ** 2 for pair in pairs)) for i in (0, 1))
            share = change / before if before else (math.inf if change else 0.0)
            row["relative_change"] = abs(self.alpha) * share
        return pd.DataFrame(rows).drop(columns="_tensors")

    def _rows(self) -> list[dict[str, Any]]:
        index = self.selection.index
        totals = index.modules().groupby("module", sort=False)["components"].sum()
        rows = []
        for module, part in self.selection.table().groupby("module", sort=False):
            rows.append(
                {
                    "module": module,
                    "kind": " ".join(dict.fromkeys(part["kind"])),
                    "edited": len(part),
                    "parameters": int(part["n_parameters"].sum()),
                    "components": int(totals[module]),
                    "_tensors": list(dict.fromkeys(part["parameter"])),
                }
            )
        for name, size in self.operation.whole.items():
            row: dict[str, Any] = {
                "module": name,
                "kind": "parameter",
                "edited": 0,
                "parameters": size,
                "components": 0,
            }
            rows.append({**row, "_tensors": [name]})
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit, its change only, as safetensors with a JSON header. Overwrites a file of that name."""
        from coar.editing.files import save_edit

        save_edit(self, path)

    def _check(self, model: nn.Module, any_weights: bool) -> None:
        try:
            self.selection.index.check(model)
        except ModelMismatchError as error:
            raise EditMismatchError(
                f"This edit was made for another model: give that one, or find an edit for this one. {error}"
            ) from error
        if self.base is not None and not any_weights:
            found = model_hash(model)
            if found != self.base:
                raise EditMismatchError(
                    f"This edit was made for a model with weights {self.base[:12]}, this {type(model).__name__} has "
                    f"{found[:12]}: its components mean something else. Give the original model; or, if that is what "
                    "you want (e.g. a second edit on top of a first), pass any_weights=True."
                )


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def conflicts(first: Edit, second: Edit) -> list[str]:
    """Returns the names of the parameters in which two edits of one index change a common weight."""
    whole = (set(first.operation.whole), set(second.operation.whole))
    touched = [set(edit.selection.table()["parameter"]) for edit in (first, second)]
    both = {*overlap(first.selection, second.selection), *(whole[0] & whole[1])}
    return sorted(both | (whole[0] & touched[1]) | (whole[1] & touched[0]))
