"""Edit: a selection, an operation on it and a strength. A value: applying one never changes the model it is given."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ablate import ComponentIndex, ModelMismatchError, Selection, model_hash
from ablate.gating import attenuate, attenuated
from coar.errors import EditError, EditMismatchError

FORMAT = "component-edit"
FORMAT_VERSION = 1
OPERATIONS = ("ablate",)


@dataclass(frozen=True)
class Edit:
    """What to change in a model, and how strongly. Immutable.

    Attributes:
      selection: The components that are changed.
      operation: `ablate`: their weights are multiplied by 1 - alpha; biases and normalisation stay.
      alpha: Strength from 0 (the original model, bit for bit) to 1 (the full edit).
      base: Hash of the model's weights that the edit was made for; None: any model its index describes.
      method: What found it.
      details: How: JSON-able, e.g. the ranking and the predicted effects.
    """

    selection: Selection
    operation: str = "ablate"
    alpha: float = 1.0
    base: str | None = None
    method: str = "by hand"
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise EditError(f"operation is {self.operation!r}, expected one of {', '.join(OPERATIONS)}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise EditError(f"alpha is {self.alpha}, expected 0 (the original model) to 1 (the full edit).")
        if not len(self.selection):
            raise EditError("The selection is empty: there is nothing to edit. Select at least one component.")

    def __repr__(self) -> str:
        return (
            f"<Edit: {self.operation} {len(self.selection)} of {len(self.selection.index):,} components at "
            f"alpha={self.alpha:g}, by {self.method}>"
        )

    def at(self, alpha: float) -> Edit:
        """Returns this edit at another strength."""
        return replace(self, alpha=alpha)

    def apply(self, model: nn.Module, *, any_weights: bool = False) -> nn.Module:
        """Returns a new model with the edit; the model given is unchanged and shares no tensor with it.

        Args:
          model: The model the edit was made for.
          any_weights: Apply also to a model of the same structure with other weights, e.g. one edited before.

        Raises:
          EditMismatchError: The edit was made for another model.
        """
        self._check(model, any_weights)
        edited = copy.deepcopy(model)
        attenuate(edited, self.selection, 1.0 - self.alpha)
        return edited

    @contextmanager
    def applied(self, model: nn.Module, *, any_weights: bool = False) -> Iterator[nn.Module]:
        """Gives the model with the edit, for the time of a `with` block; restores it bit for bit, also on error."""
        self._check(model, any_weights)
        with attenuated(model, self.selection, 1.0 - self.alpha):
            yield model

    def describe(self) -> pd.DataFrame:
        """Returns per touched module: how many of its components are edited, of how many, and of which parameters."""
        totals = self.selection.index.modules().set_index("module")["components"]
        table = (
            self.selection.table()
            .groupby("module", sort=False)
            .agg(kind=("kind", "first"), edited=("id", "size"), parameters=("n_parameters", "sum"))
        )
        return table.assign(components=totals.loc[table.index]).reset_index()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit, without any weights, as safetensors with a JSON header. Overwrites a file of that name."""
        from safetensors.numpy import save_file

        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "operation": self.operation,
            "alpha": self.alpha,
            "base": self.base,
            "method": self.method,
            "details": dict(self.details),
            "index_hash": self.selection.index.hash,
            "index": self.selection.index.to_json(),
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.draft")
        save_file({"component_ids": np.array(self.selection.ids, dtype=np.int64)}, draft, {"edit": json.dumps(header)})
        os.replace(draft, target)

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


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Returns the edit in a file that `Edit.save` wrote.

    Raises:
      EditError: The file is missing, damaged or something else.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise EditError(f"No edit at {path}: there is no such file. Check the path.")
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("edit")
            header = json.loads(text or "{}")
            ids = file.get_tensor("component_ids").tolist() if text else []
        found = (header.get("format"), header.get("format_version"))
        if found == (FORMAT, FORMAT_VERSION):
            index = ComponentIndex.from_json(header["index"])
            fields = {name: header[name] for name in ("operation", "alpha", "base", "method", "details")}
            return Edit(index.select(ids), **fields)
    except Exception as error:  # safetensors, JSON and numpy raise many types
        raise EditError(
            f"{path} cannot be read as an edit: {type(error).__name__}: {str(error).rstrip('.')}. It is damaged or "
            "something else; restore it from a copy, or make the edit again."
        ) from error
    if text is None:
        raise EditError(f"{path} holds tensors but no edit: it was not written by Edit.save. Check the path.")
    raise EditError(
        f"{path} has format {found[0]!r} version {found[1]}, this version of the toolkit reads {FORMAT!r} version "
        f"{FORMAT_VERSION}."
    )
