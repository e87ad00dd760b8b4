"""What an edit touches, and how much, as a table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from coar.editing.edits.roles import note_from_names
from coar.editing.edits.value import EditValue


def description(edit: EditValue) -> pd.DataFrame:
    """Returns one row per module that an edit touches; see `Edit.describe`. Mutates nothing."""
    rows = _rows(edit)
    for row in rows:
        names = row.pop("tensors")
        if edit.norms:
            row["relative_change"] = _relative_change(edit, names)
        notes = [edit.notes[name] for name in names if name in edit.notes]
        if not edit.norms and row["edited"]:  # no model was looked at
            notes = [note_from_names(row["module"], names[0])]
        row["note"] = "; ".join(filter(None, notes))
    table = pd.DataFrame(rows)
    return table if table["note"].any() else table.drop(columns="note")


def _relative_change(edit: EditValue, names: list[str]) -> float:
    """Returns the norm of the change over that of what was there; NaN if one of the norms is not known."""
    pairs = [edit.norms[name] for name in names if name in edit.norms]
    before, change = (math.hypot(*(pair[i] for pair in pairs)) for i in (0, 1))
    share = change / before if before else (math.inf if change else 0.0)
    return abs(edit.alpha) * share


def _rows(edit: EditValue) -> list[dict[str, Any]]:
    index = edit.selection.index
    totals = index.modules().groupby("module", sort=False)["components"].sum()
    with_bias = {port.module for port in index.ports if port.with_bias}
    rows: list[dict[str, Any]] = []
    for name, part in edit.selection.table().groupby("module", sort=False):
        module = str(name)
        tensors = list(dict.fromkeys(part["parameter"]))
        if module in with_bias and "residual_branch" in set(part["kind"]):
            tensors.append(f"{module}.bias" if module else "bias")
        rows.append(
            {
                "module": module,
                "kind": " ".join(dict.fromkeys(part["kind"])),
                "edited": len(part),
                "parameters": int(part["n_parameters"].sum()),
                "components": int(totals[module]),
                "tensors": tensors,
            }
        )
    for name, size in edit.operation.whole.items():
        rows.append(
            {"module": name, "kind": "parameter", "edited": 0, "parameters": size, "components": 0, "tensors": [name]}
        )
    return rows
