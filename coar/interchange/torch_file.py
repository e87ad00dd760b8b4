"""Attributions as the published code keeps them: a `.pt` file with `weight` (components, examples) and `bias`.

Layout (MadryLab/modelcomponents, `run_regression.py`): a dict of tensors `weight` (components, examples), `bias`
(examples,) and `lam` (examples,), the penalty that was chosen; a positive weight supports the output, as here. Weights
are per standard deviation of the masks, and the bias is the mean output: see `units`. Files of ours have the number
`ablate_fraction` beside them.
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
from coar.interchange.units import OTHER_UNITS, standardised
from stores import AttributionStore

Array = npt.NDArray[Any]

OPTIONAL = ("lam", "ablate_fraction")
_OLD_FORMAT = "mmap can only be used"  # torch before 1.6: read at once instead
_NUMPY_KNOWS = (torch.float16, torch.float32, torch.float64)


def write_torch_file(store: AttributionStore, path: Path) -> None:
    """Writes `weight` (components, examples), `bias` (examples,), float32, and `ablate_fraction`, as tensors.

    Cost: a scratch file as large as the weights lies beside `path` meanwhile, so that memory stays bounded.

    Raises:
      InterchangeError: The store does not say the ablate fraction, without which there are no such units.
    """
    identity = store.header["identity"]
    as_they_are = identity.get("units") == OTHER_UNITS
    fraction = identity["of"]["plan"]["ablate_fraction"]
    if fraction is None and not as_they_are:
        raise InterchangeError(
            f"{store.where} does not say which share of components was ablated, and the weights of a .pt file are per "
            "standard deviation of the masks. Export .npz, which keeps them as they are."
        )
    ablated = None if fraction is None or as_they_are else float(np.mean(fraction))
    scratch = path.with_name(f"{path.name}.weights")
    try:
        weight = np.memmap(scratch, np.float32, "w+", shape=(store.component_count, store.example_count))
        bias = np.empty(store.example_count, dtype=np.float32)
        for span in slabs(store, 20 * store.component_count):
            values = store.weights[span], store.bias[span]
            slab, bias[span] = values if ablated is None else standardised(*values, 1 - ablated)
            weight[:, span] = slab.T
        written = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
        if ablated is not None:
            written["ablate_fraction"] = torch.tensor(ablated, dtype=torch.float64)
        torch.save(written, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_torch_file(path: Path) -> dict[str, Array]:
    """Returns `weight`, `bias` and, if there, `lam` and `ablate_fraction` of a file in the published layout.

    They are read from disk when used.

    Raises:
      InterchangeError: The file holds something else than a dict of tensors with `weight` and `bias`.
    """
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise InterchangeError(f"{path} holds a {type(loaded).__name__}, expected a dict with `weight` and `bias`.")
    found = {}
    for name in ("weight", "bias", *OPTIONAL):
        value = loaded.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
            found[name] = (value if value.dtype in _NUMPY_KNOWS else value.float()).detach().numpy()
        elif name not in OPTIONAL:
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
