"""Attributions as the published code keeps them: a `.pt` file with `weight` (components, examples) and `bias`.

Layout (MadryLab/modelcomponents, `run_regression.py`): a dict of tensors `weight` (components, examples), `bias`
(examples,) and `lam` (examples,), the penalty that was chosen; a positive weight supports the output, as here.
Files are read with `weights_only=True`: a file that asks for anything but tensors is refused, and nothing of it runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coar.interchange.errors import InterchangeError
from coar.interchange.slabs import slabs
from stores import AttributionStore

Array = npt.NDArray[Any]

_OLD_FORMAT = "mmap can only be used"  # torch before 1.6: read at once instead
_NUMPY_KNOWS = (torch.float16, torch.float32, torch.float64)


def write_torch_file(store: AttributionStore, path: Path) -> None:
    """Writes `weight` (components, examples) and `bias` (examples,), float32, for `torch.load(weights_only=True)`.

    Cost: a scratch file as large as the weights lies beside `path` meanwhile, so that memory stays bounded.
    """
    scratch = path.with_name(f"{path.name}.weights")
    try:
        weight = np.memmap(scratch, np.float32, "w+", shape=(store.component_count, store.example_count))
        for span in slabs(store, 4 * store.component_count):
            weight[:, span] = store.weights[span].T
        torch.save({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(store.bias[:])}, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_torch_file(path: Path) -> dict[str, Array]:
    """Returns `weight`, `bias` and, if it is there, `lam` of a file in the published layout, read from disk when used.

    Raises:
      InterchangeError: The file holds something else than a dict of tensors with `weight` and `bias`.
    """
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise InterchangeError(f"{path} holds a {type(loaded).__name__}, expected a dict with `weight` and `bias`.")
    found = {}
    for name in ("weight", "bias", "lam"):
        value = loaded.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
            found[name] = (value if value.dtype in _NUMPY_KNOWS else value.float()).detach().numpy()
        elif name != "lam":
            there = ", ".join(map(str, loaded)) or "nothing"
            raise InterchangeError(
                f"{path} has no tensor {name!r} of floating-point numbers, it has {there}. Expected `weight` "
                "(components, examples) and `bias` (examples,)."
            )
    return found


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if _OLD_FORMAT not in str(error):
            raise _refused(path, error) from error
    except Exception as error:  # torch and pickle raise many types
        raise _refused(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> InterchangeError:
    # torch's own text advises to load the file all the same: never repeat that
    code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if code is not None:
        why = f"it asks for {code[1]}, which is code. Files that contain code are refused, and none of it ran"
    else:
        why = f"it is damaged or of another format ({type(error).__name__})"
    return InterchangeError(f"{path} is no file of plain tensors: {why}. Save a dict of tensors with torch.save.")
