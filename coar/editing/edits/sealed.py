"""Files of tensors and a JSON header that notice damage: a sha256 over both is in the header, and checked.

Safetensors has no checksum of its own: one flipped bit of a weight would be read as another weight. Never code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ablate.files import written_whole
from coar.editing.edits.digest import digest
from coar.errors import EditError
from stores.storage.places import user_path

_CHECKSUM = "sha256"


class DamagedFileError(EditError):
    """A file whose content does not have the checksum that is written in it."""


@dataclass(frozen=True, eq=False)
class Sealed:
    """What was in a file.

    Attributes:
      header: None: the file holds tensors only, or the header of something else.
      checked: Whether it has a checksum; files of earlier versions have none.
    """

    header: Any
    tensors: Mapping[str, Tensor]
    checked: bool


def write_sealed(
    path: str | os.PathLike[str], key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes tensors and, in the metadata under `key`, a header, whole or not at all. Overwrites a file of that name.

    Raises:
      EditError: The header holds what JSON does not know; nothing is written.
    """
    from safetensors.torch import save_file

    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise EditError(f"{path} is not written: {error}. Details are text, numbers, lists and mappings.") from error
    values = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # within the header, because safetensors writes several entries of metadata in any order
    sealed = json.dumps({**header, _CHECKSUM: digest(text, values)})
    with written_whole(user_path(path), overwrite=True) as draft:
        save_file(values, draft, {key: sealed})


def read_sealed(path: str | os.PathLike[str], key: str) -> Sealed:
    """Returns what is in a file that `write_sealed` wrote, or an earlier version without a checksum.

    Raises:
      DamagedFileError: The content does not have the checksum that the file says.
      safetensors.SafetensorError, ValueError: It is no such file, or damaged so that it cannot be read at all.
    """
    from safetensors import safe_open

    with safe_open(user_path(path), framework="pt") as file:
        text = (file.metadata() or {}).get(key)
        if text is None:
            return Sealed(None, {}, checked=False)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    header = json.loads(text)
    stored = header.pop(_CHECKSUM, None) if isinstance(header, dict) else None
    if stored is not None and stored != digest(json.dumps(header), tensors):
        raise DamagedFileError("what it holds does not have the checksum that is written in it")
    return Sealed(header, tensors, stored is not None)
