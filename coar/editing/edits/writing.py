"""Edits into files: safetensors that hold the change only, with a JSON header that says what it is."""

from __future__ import annotations

import os

import torch

from coar.editing.edits.parts import part_header
from coar.editing.edits.sealed import write_sealed
from coar.editing.edits.value import EditValue

FORMAT = "component-edit"
FORMAT_VERSION = 3
KEY = "edit"
IDS = "component_ids"


def save_edit(edit: EditValue, path: str | os.PathLike[str]) -> None:
    """Writes an edit; see `Edit.save`."""
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **part_header(edit),
        "base": edit.base,
        "norms": {name: list(pair) for name, pair in edit.norms.items()},
        "notes": dict(edit.notes),
        "index_hash": edit.selection.index.hash,
        "index": edit.selection.index.to_json(),
    }
    ids = torch.tensor(edit.selection.ids, dtype=torch.int64)
    write_sealed(path, KEY, header, {**edit.operation.tensors(), IDS: ids})
