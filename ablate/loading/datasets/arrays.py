"""Examples in a .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ablate.data.examples import Examples
from ablate.errors import DataError, LoadError


def arrays_data(path: Path) -> Examples:
    """Returns `inputs`, `targets` and, if there, `ids`, `groups` and the `mean` and `std` of uint8 images."""
    if not path.is_file():
        raise LoadError(f"No file at {path}. Make one with numpy.savez(path, inputs=..., targets=...).")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # numpy and zipfile raise many types
        raise LoadError(f"{path} cannot be read as .npz: {type(error).__name__}: {error}.") from error
    missing = [name for name in ("inputs", "targets") if name not in arrays]
    if missing:
        raise LoadError(
            f"{path} has no {' and no '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}. "
            "Expected inputs, targets and, if wanted, ids and groups."
        )
    if ("mean" in arrays) != ("std" in arrays):
        raise LoadError(f"{path} has one of mean and std. Give both, to normalise uint8 images, or none.")
    normalize = (arrays["mean"].tolist(), arrays["std"].tolist()) if "mean" in arrays else None
    try:
        return Examples(
            arrays["inputs"], arrays["targets"], arrays.get("ids"), arrays.get("groups"), normalize=normalize
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
