"""Edits in files: safetensors that hold the change only, with a JSON header that says what it is. Never code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablate import ComponentIndex
from coar.editing.edit import Edit
from coar.editing.operations import OPERATIONS, Ablate, Operation
from coar.editing.together import Together, part_header
from coar.errors import EditError

FORMAT = "component-edit"
FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 knew ablation only
IDS = "component_ids"


def save_edit(edit: Edit, path: str | os.PathLike[str]) -> None:
    """Writes an edit; see `Edit.save`."""
    from safetensors.torch import save_file

    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **part_header(edit),
        "base": edit.base,
        "norms": {name: list(pair) for name, pair in edit.norms.items()},
        "index_hash": edit.selection.index.hash,
        "index": edit.selection.index.to_json(),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in edit.operation.tensors().items()}
    tensors[IDS] = torch.tensor(edit.selection.ids, dtype=torch.int64)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    try:
        save_file(tensors, draft, {"edit": json.dumps(header)})
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Returns the edit in a file that `Edit.save` wrote.

    Raises:
      EditError: The file is missing, damaged or something else.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise EditError(f"No edit at {path}: there is no such file. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("edit")
            header = json.loads(text or "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118 - no mapping
        found = (header.get("format"), header.get("format_version"))
        if found[0] == FORMAT and type(found[1]) is int and found[1] in READABLE:
            return _restored(header, tensors)
    except Exception as error:  # safetensors, JSON and numpy raise many types
        raise EditError(
            f"{path} cannot be read as an edit: {type(error).__name__}: {str(error).rstrip('.')}. It is damaged or "
            "something else; restore it from a copy, or make the edit again."
        ) from error
    if text is None:
        raise EditError(f"{path} holds tensors but no edit: it was not written by Edit.save. Check the path.")
    raise EditError(
        f"{path} has format {found[0]!r} version {found[1]}, this version of the toolkit reads {FORMAT!r} versions "
        f"{' and '.join(map(str, READABLE))}."
    )


def _restored(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    index = ComponentIndex.from_json(header["index"])
    base = header["base"]
    if not isinstance(base, (str, type(None))):
        raise EditError(f"base is a {type(base).__name__}, expected a hash or null")
    if header["index_hash"] != index.hash:
        raise EditError(f"index_hash is {header['index_hash']!r}, the index has {index.hash!r}")
    if header["format_version"] == 1:
        if header["operation"] != Ablate.name:
            raise EditError(f"operation is {header['operation']!r}, version 1 knows ablate only")
        settings = {"operation": Ablate.name, "settings": {}, "extrapolates": False}
        return _part(index, {**header, **settings}, tensors, base)
    norms = {str(name): (float(before), float(change)) for name, (before, change) in header["norms"].items()}
    if header["operation"] != Together.name:
        return _part(index, header, tensors, base, norms)
    parts = []
    for number, part in enumerate(header["settings"]["parts"]):
        own = {name.removeprefix(f"{number}/"): t for name, t in tensors.items() if name.startswith(f"{number}/")}
        parts.append(_part(index, part, own, base))
    return _part(index, header, tensors, base, norms, Together(tuple(parts)))


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
    operation: Operation | None = None,
) -> Edit:
    _require_types(header)
    if operation is None:
        kind = OPERATIONS.get(header["operation"])
        if kind is None:
            raise EditError(f"operation is {header['operation']!r}, expected one of {', '.join(OPERATIONS)}")
        operation = kind.restore(header["settings"], tensors)
    for name, tensor in operation.tensors().items():
        if not torch.isfinite(tensor).all():
            raise EditError(f"tensor {name!r} holds values that are not finite")
    return Edit(
        index.select(tensors[IDS].tolist()),
        operation,
        header["alpha"],
        base,
        header["method"],
        header["details"],
        norms or {},
        bool(header["extrapolates"]),
    )
