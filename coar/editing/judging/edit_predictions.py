"""Predictions of many edited models, kept: every metric can be computed again from them, without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate.files import written_whole
from coar.errors import CoarError, EditError
from coar.metrics.accuracies import Accuracy
from coar.metrics.checks import as_classes
from coar.metrics.drawdowns import Drawdown, EditSuccess, drawdown, edit_success
from coar.metrics.pareto import OperatingPoint
from coar.metrics.rates import (
    GeneralisationRate,
    LocalityRate,
    SuccessRate,
    Version,
    generalisation_rate,
    locality_rate,
    success_rate,
)
from stores.storage.places import user_path

FORMAT = "edit-predictions"
FORMAT_VERSION = 1
LOCALITY = "locality"
ARRAYS = ("labels", "base", "edited")

Classes = npt.NDArray[np.integer[Any]]


def compact(classes: Classes) -> Classes:
    """Returns a copy of class numbers in uint16, or uint32 if one is 65,536 or more. Mutates nothing."""
    top = int(classes.max()) if classes.size else 0
    return classes.astype(np.uint16 if top < 2**16 else np.uint32)


@dataclass(frozen=True, eq=False)
class KeptPredictions:
    """Predicted classes for one set of examples, in uint16 (uint32 beyond 65,536 classes).

    Attributes:
      ids: The examples' names.
      labels: (examples,): what should be predicted.
      base: (examples,): what the unedited model predicts.
      edited: (edits, examples): what the model of each edit predicts.
    """

    ids: tuple[str, ...]
    labels: Classes
    base: Classes
    edited: Classes

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name, shape in (("labels", (n,)), ("base", (n,)), ("edited", (None, n))):
            small = compact(as_classes(f"Predictions kept as {name!r}", getattr(self, name), *shape))
            small.flags.writeable = False
            object.__setattr__(self, name, small)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def base_accuracy(self) -> Accuracy:
        """Of the unedited model."""
        return Accuracy(int((self.base == self.labels).sum()), len(self))


@dataclass(frozen=True, eq=False)
class EditPredictions:
    """What single-example edits predict: for the examples they were made for, the rest of the group, and other sets.

    Attributes:
      groups: Per group the predictions of its examples by each of its edits: `edited[e, x]` is what the model edited
        for example e predicts for example x, so the diagonal holds the edited examples.
      sets: Per further set, e.g. `locality`, the predictions by all edits, those of the first group first.
      method: What made the edits.
      model: Hash of the unedited model.
      details: JSON-able: whatever else is worth keeping.
    """

    groups: Mapping[str, KeptPredictions]
    sets: Mapping[str, KeptPredictions] = field(default_factory=dict)
    method: str = ""
    model: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, group in self.groups.items():
            if len(group.edited) != len(group):
                raise EditError(
                    f"Group {name!r} has {len(group)} examples and {len(group.edited)} edits, expected an edit per "
                    "example."
                )
        for name, kept in self.sets.items():
            if len(kept.edited) != self.edits:
                raise EditError(
                    f"Set {name!r} has predictions of {len(kept.edited)} edits, the groups of {self.edits}."
                )

    def __repr__(self) -> str:
        sets = "".join(f", {name}: {len(kept):,} examples" for name, kept in self.sets.items())
        return f"<EditPredictions: {self.edits:,} edits by {self.method} in {len(self.groups):,} groups{sets}>"

    @property
    def edits(self) -> int:
        """How many edits there are: one per example of the groups."""
        return sum(len(group) for group in self.groups.values())

    @property
    def edit_groups(self) -> tuple[str, ...]:
        """The group of each edit, in the order of the edits."""
        return tuple(name for name, group in self.groups.items() for _ in range(len(group)))

    @property
    def protocol(self) -> str:
        """How the predictions were made, in words; each metric says for itself what it counts."""
        sets = "".join(f", {len(kept):,} of {name}" for name, kept in self.sets.items())
        return (
            f"Single-example editing: {self.edits:,} edits by {self.method} in {len(self.groups):,} groups, each from "
            f"the unedited model {self.model[:12]}; after each edit all examples of its group{sets} are predicted, and "
            "the edit is forgotten."
        )

    def success(self) -> SuccessRate:
        """Returns the success rate: of edited examples, how many are predicted as asked."""
        groups = self.groups.values()
        joined = [
            np.concatenate([part(group) for group in groups] or [np.zeros(0, dtype=np.uint16)])
            for part in (lambda g: np.diagonal(g.edited), lambda g: g.labels, lambda g: g.base)
        ]
        return success_rate(*joined)

    def generalisation(self, version: Version = "equation") -> GeneralisationRate:
        """Returns the generalisation rate, macro-averaged over groups; see `coar.metrics.generalisation_rate`."""
        return generalisation_rate(self._in_scope(), version=version)

    def edit_success(self) -> EditSuccess:
        """Returns the accuracy on whole groups, the edited example included."""
        return edit_success(self._in_scope())

    def locality(self, name: str = LOCALITY) -> LocalityRate:
        """Returns how far a set's predictions stay what they were (agreement), and how far they are right."""
        kept = self._set(name)
        return locality_rate(kept.edited, kept.base, kept.labels, self.edit_groups)

    def drawdown(self, name: str = LOCALITY) -> Drawdown:
        """Returns what a set loses by the edits, in three named variants."""
        kept = self._set(name)
        return drawdown(kept.edited, kept.base, kept.labels)

    def point(self, name: str) -> OperatingPoint:
        """Returns the operating point for a curve of generalisation against locality."""
        rates = self.locality().value, self.generalisation().value, self.success().value
        return OperatingPoint(name, *rates, method=self.method)

    def table(self) -> pd.DataFrame:
        """Returns one row per metric and set: metric, set, value, low, high, count, of, protocol.

        low and high: 95 % bootstrap interval over edits; of generalisation over groups where there are several.
        """
        rows = [
            {"set": "edited", **rate.row()} for rate in (self.success(), self.edit_success(), self.generalisation())
        ]
        for name in self.sets:
            rows += [{"set": name, **row} for row in (*self.locality(name).rows(), self.drawdown(name).row())]
        columns = ["metric", "set", "value", "low", "high", "count", "of", "protocol"]
        return pd.DataFrame(rows, columns=columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as safetensors with a JSON header. Overwrites a file of that name."""
        from safetensors.numpy import save_file

        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "model": self.model,
            "details": dict(self.details),
            "groups": [{"name": name, "ids": kept.ids} for name, kept in self.groups.items()],
            "sets": [{"name": name, "ids": kept.ids} for name, kept in self.sets.items()],
        }
        arrays = {
            f"{part}/{i}/{array}": np.ascontiguousarray(getattr(kept, array))
            for part, values in (("groups", self.groups), ("sets", self.sets))
            for i, kept in enumerate(values.values())
            for array in ARRAYS
        }
        with written_whole(user_path(path), overwrite=True) as draft:
            save_file(arrays, draft, {"predictions": json.dumps(header)})

    def _in_scope(self) -> dict[str, tuple[Any, Any]]:
        return {name: (kept.edited, kept.labels) for name, kept in self.groups.items()}

    def _set(self, name: str) -> KeptPredictions:
        if name not in self.sets:
            known = ", ".join(map(repr, self.sets)) or "none"
            raise EditError(f"There are no predictions for a set {name!r}. Known: {known}. Evaluate the edits on it.")
        return self.sets[name]


def load_edit_predictions(path: str | os.PathLike[str]) -> EditPredictions:
    """Returns the predictions in a file that `EditPredictions.save` wrote. Nothing in it is executed.

    Raises:
      EditError: The file is missing, damaged or something else.
    """
    from safetensors import safe_open

    if not user_path(path).is_file():
        raise EditError(f"No predictions at {path}: there is no such file. Check the path.")
    try:
        with safe_open(user_path(path), framework="np") as file:
            text = (file.metadata() or {}).get("predictions")
            header = json.loads(text or "{}")
            found = (header.get("format"), header.get("format_version"))
            if found == (FORMAT, FORMAT_VERSION):
                return _restored(header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except Exception as error:  # safetensors, JSON and numpy raise many types
        why = str(error) if isinstance(error, CoarError) else f"{type(error).__name__}: {error}"
        raise EditError(
            f"{path} cannot be read as predictions of edits: {why.rstrip('.')}. It is damaged or something else; "
            "restore it from a copy, or evaluate the edits again."
        ) from error
    if text is None:
        raise EditError(
            f"{path} holds tensors but no predictions: EditPredictions.save did not write it. Check the path."
        )
    raise EditError(
        f"{path} has format {found[0]!r} version {found[1]}, this version of the toolkit reads {FORMAT!r} version "
        f"{FORMAT_VERSION}."
    )


def _restored(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> EditPredictions:
    groups, sets = (dict(_parts(part, header[part], arrays)) for part in ("groups", "sets"))
    return EditPredictions(groups, sets, str(header["method"]), str(header["model"]), dict(header["details"]))


def _parts(part: str, entries: Any, arrays: Mapping[str, Any]) -> Iterator[tuple[str, KeptPredictions]]:
    for i, entry in enumerate(entries):
        values = [arrays[f"{part}/{i}/{array}"] for array in ARRAYS]
        yield str(entry["name"]), KeptPredictions(tuple(map(str, entry["ids"])), *values)
