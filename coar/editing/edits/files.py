"""Edits in files: safetensors that hold the change only, with a JSON header that says what it is. Never code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ablate import ComponentIndex
from coar.editing.edits.chain import Chain
from coar.editing.edits.edit import Edit
from coar.editing.edits.operations import OPERATIONS, Ablate, Operation
from coar.editing.edits.parts import Parts
from coar.editing.edits.sealed import Sealed, read_sealed
from coar.editing.edits.together import Together
from coar.editing.edits.writing import FORMAT, IDS, KEY
from coar.errors import EditError
from stores.storage.places import user_path

READABLE = (1, 2, 3)  # 1 knew ablation only, 2 had no checksum and of deltas the end points only
OF_PARTS: dict[str, type[Parts]] = {kind.name: kind for kind in (Together, Chain)}


def load_edit(path: str | os.PathLike[str], *, base: nn.Module | None = None) -> Edit:
    """Returns the edit in a file that `Edit.save` wrote. Its checksum is checked; files of format 1 and 2 have none.

    Args:
      path: The file.
      base: The model that the edit was made for. Needed only for a delta of format 2 that is to fit other weights:
        such a file holds end points, and the difference from the model is what can be added elsewhere.

    Raises:
      EditError: The file is missing, damaged or something else.
      EditMismatchError: `base` is another model.
    """
    edit = _restored(path, read_edit_file(path))
    return edit if base is None else edit.from_base(base)


def read_edit_file(path: str | os.PathLike[str]) -> Sealed:
    """Returns what is in a file that `Edit.save` wrote: header, tensors, and whether it has a checksum.

    Raises:
      EditError: The file is missing, damaged or something else.
    """
    if not user_path(path).is_file():
        raise EditError(f"No edit at {path}: there is no such file. Check the path.")
    try:
        sealed = read_sealed(path, KEY)
    except Exception as error:  # safetensors and JSON raise many types
        raise _unreadable(path, error) from error
    if sealed.header is None:
        raise EditError(f"{path} holds tensors but no edit: it was not written by Edit.save. Check the path.")
    return sealed


def _restored(path: str | os.PathLike[str], sealed: Sealed) -> Edit:
    found = dict(sealed.header) if isinstance(sealed.header, dict) else {}
    name, version = found.get("format"), found.get("format_version")
    if name != FORMAT or type(version) is not int or version not in READABLE:
        raise EditError(
            f"{path} has format {name!r} version {version}, this version of the toolkit reads {FORMAT!r} versions "
            f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}."
        )
    try:
        return _edit(found, sealed)
    except Exception as error:  # numpy, torch and the index raise many types
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> EditError:
    return EditError(
        f"{path} cannot be read as an edit: {type(error).__name__}: {str(error).rstrip('.')}. It is damaged or "
        "something else; restore it from a copy, or make the edit again."
    )


def _edit(header: Mapping[str, Any], sealed: Sealed) -> Edit:
    if header["format_version"] >= 3 and not sealed.checked:
        raise EditError("its checksum is gone")
    index = ComponentIndex.from_json(header["index"])
    if header["index_hash"] != index.hash:
        raise EditError(f"index_hash is {header['index_hash']!r}, the index has {index.hash!r}")
    if header["format_version"] == 1:
        if header["operation"] != Ablate.name:
            raise EditError(f"operation is {header['operation']!r}, version 1 knows ablate only")
        header = {**header, "operation": Ablate.name, "settings": {}, "extrapolates": False, "norms": {}}
    norms = {str(name): (float(before), float(change)) for name, (before, change) in header["norms"].items()}
    notes = {str(name): str(note) for name, note in header.get("notes", {}).items()}
    return _part(index, header, sealed.tensors, header["base"], norms, notes)


TYPES: dict[str, tuple[type, ...]] = {
    "operation": (str,),
    "settings": (dict,),
    "alpha": (int, float),
    "extrapolates": (bool,),
    "method": (str,),
    "details": (dict,),
}


def _require_types(header: Mapping[str, Any]) -> None:
    """Raises EditError for a value of a type that no edit has."""
    for name, types in TYPES.items():
        value = header[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join(kind.__name__ for kind in types)
            raise EditError(f"{name} is a {type(value).__name__}, expected {names}")


def _part(
    index: ComponentIndex,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: str | None,
    norms: Mapping[str, tuple[float, float]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Edit:
    """Returns an edit or a part of one; `base` is that of the whole, which files of format 2 do not repeat."""
    _require_types(header)
    if not isinstance(base, (str, type(None))):
        raise EditError(f"base is a {type(base).__name__}, expected a hash or null")
    return Edit(
        index.select(tensors[IDS].tolist()),
        _operation(index, header, tensors, base),
        header["alpha"],
        base,
        header["method"],
        header["details"],
        norms or {},
        bool(header["extrapolates"]),
        notes or {},
    )


def _operation(
    index: ComponentIndex, header: Mapping[str, Any], tensors: Mapping[str, Tensor], base: str | None
) -> Operation:
    name, settings = header["operation"], header["settings"]
    if name in OF_PARTS:
        parts = []
        for number, part in enumerate(settings["parts"]):
            own = {key.removeprefix(f"{number}/"): t for key, t in tensors.items() if key.startswith(f"{number}/")}
            parts.append(_part(index, part, own, part.get("base", base)))
        return OF_PARTS[name].of(parts, settings)
    if name not in OPERATIONS:
        raise EditError(f"operation is {name!r}, expected one of {', '.join((*OPERATIONS, *OF_PARTS))}")
    operation = OPERATIONS[name].restore(settings, tensors)
    for key, tensor in operation.tensors().items():
        if not torch.isfinite(tensor).all():
            raise EditError(f"tensor {key!r} holds values that are not finite")
    return operation
